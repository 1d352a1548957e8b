"""One outgoing migration: the story, the rounds, the switchover."""
