"""Weights and adapters on disk: exports, imports, the files of a base model."""
