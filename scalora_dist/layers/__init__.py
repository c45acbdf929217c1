"""Linear layers with something added to them, and where they go in a model."""
