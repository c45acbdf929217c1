"""Measures seconds, bytes, collectives and FLOPs. Does not depend on models or engines."""
