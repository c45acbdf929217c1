"""Turns the name of a data set into the token batches of each rank.

An arrow means "imports": ``prepare -> tokenize -> prompts``,
``prepare -> sources -> generated, malformed``, ``prepare -> identity``. ``batches``, ``collate``
and ``identity`` only use token columns.
"""
