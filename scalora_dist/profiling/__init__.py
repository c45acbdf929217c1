"""Clocks and counters: seconds, bytes, messages and FLOPs. Knows no model and no engine."""
