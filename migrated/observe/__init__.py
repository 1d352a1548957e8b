"""The daemon as seen from outside while it runs: progress, log, metrics."""
