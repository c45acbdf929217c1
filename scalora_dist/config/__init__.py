"""The options of a run: dataclasses, and the parser that fills them."""
