"""The options: dataclasses, and the parser that fills them in."""
