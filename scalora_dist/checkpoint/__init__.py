"""Checkpoints of a run, in one format for all engines and any number of ranks."""
