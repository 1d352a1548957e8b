"""What survives a restart of the daemon: decisions, finished records, what predictions learned."""
