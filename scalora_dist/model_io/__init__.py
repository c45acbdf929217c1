"""Reads and writes weights on disk: base models, merged models, LoRA adapters."""
