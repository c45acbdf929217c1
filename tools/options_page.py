"""Writes docs/options.md from the declarations of the options.

python tools/options_page.py
"""

from __future__ import annotations

import sys
from dataclasses import Field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from scalora_dist.config.method import ADAPTED
from scalora_dist.config.option import Declaration, declarations, default_of
from scalora_dist.config.options import GROUPS
from scalora_dist.methods.registry import METHODS

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
HEAD = """# Options

`python tools/options_page.py` writes this page from the declarations in `scalora_dist/config/`.
All options can also be lines of a YAML recipe (`--config`); the command line overrides it.

The column *resume* says whether a run that resumes may have another value.

* **fixed**: no. The checkpoint means something else under it, and the resume is refused.
* **warned**: yes, with a warning, since the numbers may change.
* **free**: yes. The numbers stay the same, to rounding.

The base model and the data are also compared by content: a resume on other weights, token ids or
labels is refused, whatever the options say ([checkpoints.md](checkpoints.md)).
"""


def kind(hint: Any) -> str:
    """The type of a value, as a user types it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in args)
    if origin is list:
        return f"list of {kind(args[0])}"
    if args and type(None) in args:
        return kind(Union[tuple(x for x in args if x is not type(None))])
    return {bool: "true or false", int: "integer", float: "number", str: "text"}[hint]


def default(each: Field[Any]) -> str:
    value = default_of(each)
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{' '.join(map(str, value)) if isinstance(value, list) else value}`"


def readers(declaration: Declaration) -> str:
    """Which methods read an option."""
    methods = declaration.methods
    if methods is None:
        return ""
    if methods == ADAPTED:
        return " All methods but `full`."
    names = [f"`{name}`" for name in METHODS if name in methods]
    return f" Methods: {', '.join(names)}."


def row(each: Field[Any], declaration: Declaration, hint: Any) -> str:
    values, bounds = kind(hint), str(declaration.bounds)
    if bounds:
        values = bounds if bounds.endswith(values) else f"{values}, {bounds}"
    help = declaration.help.replace("%%", "%").replace("|", "\\|").replace("<", "\\<")
    cells = [f"`--{each.name}`", values, default(each), declaration.resume]
    return f"| {' | '.join(cells)} | {help}{readers(declaration)} |"


def page() -> str:
    parts = [HEAD]
    for group in GROUPS:
        hints = get_type_hints(group)
        rows = [row(each, told, hints[each.name]) for each, told in declarations(group)]
        title = group._argument_group_name.capitalize()
        parts.append(
            f"## {title}\n\n| option | value | default | resume | |\n|---|---|---|---|---|\n"
        )
        parts[-1] += "\n".join(rows) + "\n"
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE, file=sys.stderr)
