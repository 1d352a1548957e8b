"""The guests of this host, and who has his hands on one."""
