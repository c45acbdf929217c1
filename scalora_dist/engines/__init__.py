"""Engines: each says where its shards are, and nothing else does."""
