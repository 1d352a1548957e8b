"""Many hosts as one fleet: where guests may go, in which order, and who owns them, as documents and rules."""
