"""Predicts a run's memory, messages and least times from a trace on tensors without storage."""
