"""Turns the name of a data set into the token batches of each rank.

An arrow means "imports": ``prepare -> tokenize -> examples, chats, encode``,
``chats -> renderings -> prompts -> messages``, ``examples -> rows, files, prompts``,
``prepare -> sources -> folders, files, generated``, ``files -> delimited, text_lines, rows``,
``prepare -> identity``. ``batches``, ``collate``, ``extent`` and ``identity`` only use token
columns.
"""
