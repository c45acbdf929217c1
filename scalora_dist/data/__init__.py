"""From the name of a data set to the token batches of each rank.

Arrows run downward: ``prepare -> tokenize -> prompts`` and
``prepare -> sources -> generated, malformed``; ``batches`` and ``collate`` know token columns
alone.
"""
