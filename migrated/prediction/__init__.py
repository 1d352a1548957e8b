"""What the switchover will cost."""
