"""The guests of this host, and the reservation of a guest by one attempt."""
