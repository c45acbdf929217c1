"""Loads base models and computes their loss on target tokens."""
