"""Low-rank layers, where they go in a model, and how they start."""
