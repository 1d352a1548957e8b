"""One incoming migration: the story, receiving and loading, the take-over."""
