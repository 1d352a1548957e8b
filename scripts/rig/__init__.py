"""Real daemons and guests on one machine, the network between them, and a terminal and a browser to look from."""
