"""Starts of A and B, and of W beside them, that look at the data first."""
