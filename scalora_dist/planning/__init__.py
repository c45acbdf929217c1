"""What a run will need, from a trace of its model on tensors without storage."""
