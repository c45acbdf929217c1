"""Parses a command line, and the YAML file that it names, into the option dataclasses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from scalora_dist.config.options import GROUPS, Options
from scalora_dist.config.shipped import find, names
from scalora_dist.config.words import Parser, option_words, unknown_option
from scalora_dist.errors import UserError


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """Refuses a key that a mapping has twice; YAML's own loader keeps the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and (key.tag, key.value) in seen:
                problem = f"{key.value} is there twice: remove one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def parse_options(argv: Sequence[str]) -> Options:
    """Read the command line, and the YAML file its ``--config`` names, into dataclasses.

    The YAML file is a recipe: its keys are options of the command line. The same parser reads
    them first, and the command line overrides them.

    Raises:
        UserError: a missing or malformed file, an unknown option or choice, an invalid value.
    """
    parser = Parser(
        list(GROUPS),
        allow_abbrev=False,
        prog="scalora train",
        usage="scalora train --model_name_or_path MODEL --dataset DATA --output_dir FOLDER "
        "[--config RECIPE] [--option value ...]; on several ranks, "
        "deepspeed --num_gpus N launch/train.py --ds_config zero3 ... or "
        "torchrun --nproc_per_node N launch/train.py --fsdp ...",
        description="Fine-tune with ScaLoRA on shards. docs/options.md has more of each option.",
    )
    named, left = parser.parse_known_args(argv)
    recipe = find("recipes", named.config)
    if left:
        parser.refuse(left[0])
    known, words = parser.names, []
    for name, value in _read_recipe(recipe).items() if recipe else ():
        if name not in known:
            raise UserError(f"{recipe}: {unknown_option(str(name), known)}")
        if name == "config":
            raise UserError(f"{recipe}: a recipe cannot name another: remove `config`")
        parser.source = f"{recipe}, {name}: "
        parser.parse_args(field := option_words(name, value))
        words += field
    parser.source = ""
    options = Options(*parser.parse_args_into_dataclasses([*words, *argv]))
    return options.having(
        config=recipe,
        ds_config=find("ds_configs", options.launch.ds_config),
        fsdp_config=find("fsdp", options.launch.fsdp_config),
    )


def _read_recipe(path: str) -> dict[str, Any]:
    return read_yaml(path, f"--config {path}", f"; give a file, or one of {names('recipes')}")


def read_yaml(path: str, what: str, instead: str = "") -> dict[str, Any]:
    """Read a YAML file of `name: value`.

    Args:
        path: the file.
        what: how messages name it.
        instead: what a message that the file cannot be opened ends with.

    Raises:
        UserError: it cannot be read, is no YAML, is no mapping, or names a key twice.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UserError(f"{what}: {error.strerror}{instead}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what} is not UTF-8 text: {error.reason}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise UserError(f"{what}{where}: {problem}") from error
    if not isinstance(content, dict):
        raise UserError(f"{what} must hold lines of `option: value`")
    return content
