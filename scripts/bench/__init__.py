"""The benchmark beside its rivals, and what watching costs a migration."""
