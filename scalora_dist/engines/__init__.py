"""Engines (DeepSpeed, FSDP2, one process): where each keeps its shards, and how it steps."""
