"""This host as a member of a fleet: what it tells the others, the guests it owns, the jobs it works on."""
