"""Checks a machine, a network and both engines on the ranks that a run would use."""
