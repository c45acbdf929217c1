"""Turns the name of a data set into the token batches of each rank.

An arrow means "imports": ``prepare -> tokenize -> examples, chats -> prompts -> messages``,
``chats -> encode``, ``examples -> rows``, ``prepare -> sources -> folders, files, generated``,
``files -> rows``, ``prepare -> identity``. ``batches``, ``collate`` and ``identity`` only use token
columns.
"""
