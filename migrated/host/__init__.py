"""One host: its guests, its outgoing and incoming attempts, and their recovery after a restart of the daemon."""
