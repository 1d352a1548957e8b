"""The proof of the hand-over: every interleaving of the shipped core, whole endpoints in virtual time, and mutants."""
