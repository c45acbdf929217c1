"""``scalora export``: a model or an adapter from a checkpoint, in one process."""
