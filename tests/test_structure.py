"""The order of the folders: which part of the package may import which.

`docs/architecture.md` says what each folder is for. A single file at the top counts as a folder.
"""

from __future__ import annotations

import ast
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "scalora_dist"
# From the lowest to the highest. A folder imports from itself and from folders before it.
ORDER = (
    *("errors", "core", "distributed", "config", "profiling", "layers", "data", "modeling"),
    *(
        "engines",
        "methods",
        "model_io",
        "checkpoint",
        "export",
        "training",
        "planning",
        "doctor",
        "compare",
        "reproduce",
        "cli",
        "__main__",
    ),
)
DEEPEST = 13  # levels of imports
# Besides the standard library. Nothing of a model, an engine or an option.
CORE_MAY_IMPORT = {"torch", "numpy"}
NEEDS_TRITON = "core.merge_kernel"  # imported where there is a GPU and triton


def modules() -> dict[str, Path]:
    """{dotted name below the package: file}; a folder's own name is its __init__.py."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(path: Path) -> set[str]:
    """All that a file imports, in functions too, as full dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@cache
def own_imports(module: str) -> frozenset[str]:
    """The package's modules that a module imports."""
    found = set()
    for name in imported(MODULES[module]):
        root, _, rest = name.partition(".")
        if root == PACKAGE.name:
            found.add(rest if rest in MODULES else rest.rpartition(".")[0])
    return frozenset(found - {module, ""})


def height(module: str) -> int:
    return ORDER.index(module.partition(".")[0])


def test_every_module_is_in_the_order() -> None:
    assert {name.partition(".")[0] for name in MODULES} - {""} == set(ORDER)
    assert {path.name for path in PACKAGE.glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "cli.py",
        "errors.py",
    }


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_downward(module: str) -> None:
    if module:
        upward = [other for other in own_imports(module) if height(other) > height(module)]
        assert not upward, f"{module} is below {', '.join(upward)}"


def test_no_circle_and_not_too_deep() -> None:
    levels: dict[str, int] = {}

    def level(module: str, above: tuple[str, ...]) -> int:
        assert module not in above, f"a circle: {' → '.join([*above, module])}"
        if module not in levels:
            below = (level(other, (*above, module)) for other in own_imports(module))
            levels[module] = 1 + max(below, default=0)
        return levels[module]

    deepest = max(MODULES, key=lambda module: level(module, ()))
    assert levels[deepest] <= DEEPEST, f"{deepest} is on level {levels[deepest]}"


def test_only_engines_know_deepspeed_and_fsdp() -> None:
    for module, path in MODULES.items():
        if module.partition(".")[0] == "engines":
            continue
        for name in imported(path):
            assert not name.startswith(("deepspeed", "torch.distributed.fsdp")), path
        nodes = list(ast.walk(ast.parse(path.read_text())))
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        # Also getattr(p, "ds_shape").
        used |= {x.value for x in nodes if isinstance(x, ast.Constant) and isinstance(x.value, str)}
        theirs = {name for name in used if name.startswith("ds_") and name.isidentifier()}
        assert theirs <= {"ds_config", "ds_configs"}, path


def test_core_knows_no_model_engine_or_option() -> None:
    for module, path in MODULES.items():
        if module.partition(".")[0] == "core":
            roots = {name.partition(".")[0] for name in imported(path)}
            others = roots - set(sys.stdlib_module_names) - CORE_MAY_IMPORT - {PACKAGE.name}
            assert others == ({"triton"} if module == NEEDS_TRITON else set()), path
