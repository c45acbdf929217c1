"""Initial values of the methods that start from gradients or SVDs."""
