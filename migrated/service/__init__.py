"""The daemon's process, and its talk with the service manager."""
