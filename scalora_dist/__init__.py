"""ScaLoRA (arXiv 2510.23818) on sharded weights."""

__version__ = "0.2.0"
