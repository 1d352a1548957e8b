"""Guests in files: saving one while it runs or for good, and restoring it. A file holds what a migration would send."""
