"""How a method starts: what is computed over the sharded weights or gradients before training."""
