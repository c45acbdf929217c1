"""Linear layers with adapters, and the choice of a model's layers that get them."""
