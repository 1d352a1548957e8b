"""Connections between two daemons: the control channel on the event loop, data channels in threads."""
