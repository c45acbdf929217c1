"""Figures of the ScaLoRA paper that a CPU can compute: ``scalora reproduce``."""
