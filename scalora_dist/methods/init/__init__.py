"""How methods that start from gradients or SVDs fill in what they added."""
