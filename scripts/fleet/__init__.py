"""Tools around fleets: a fake store, whole fleets in virtual time, and exhaustive search for the best plan."""
