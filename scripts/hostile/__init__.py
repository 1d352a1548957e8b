"""Peers that mean harm, crowds and faults: every case as a function that the tests and ``prove_hostile`` run alike."""
