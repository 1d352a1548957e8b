"""What can be seen from outside while the daemon runs: progress, log, metrics."""
