"""A base model by name, and the loss on its target tokens."""
