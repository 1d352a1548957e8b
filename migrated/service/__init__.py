"""The daemon's process, and what it has to do with the service manager."""
