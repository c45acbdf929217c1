"""Checkpoints: one format for every engine and number of ranks.

A checkpoint is a folder ``checkpoint-<step>``: one safetensors file per rank, ``state.json`` with
all that is no tensor, and ``manifest.json`` with sizes and checksums. Nothing in it is a pickle.
"""
