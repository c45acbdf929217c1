"""A run between two steps, on disk: in one format for all engines and any number of ranks."""
