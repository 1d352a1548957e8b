"""The seam between the daemons and a VMM, and one driver per kind of VMM."""
