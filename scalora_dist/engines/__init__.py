"""DeepSpeed, FSDP2 or one process: where each keeps its shards, and how it steps."""
