"""The daemon's files, which survive its restart: journal of decisions, finished records, learned corrections."""
