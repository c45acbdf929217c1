"""The pages: their links, the length of their lines, and the options and methods that they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from scalora_dist.compare.command import CompareArguments
from scalora_dist.config.option import declarations
from scalora_dist.config.options import GROUPS
from scalora_dist.doctor.command import DoctorArguments
from scalora_dist.export.command import ExportArguments
from scalora_dist.methods.registry import METHODS
from scalora_dist.planning.arguments import PlanArguments
from scalora_dist.reproduce.command import Figure1Arguments, Figure2Arguments
from tools.options_page import page as options_page

ROOT = Path(__file__).parents[1]
FOLDERS = ("*.md", "docs/*.md", "docs/studies/*.md", "tests/*.md", ".github/*.md")
PAGES = [path for pattern in FOLDERS for path in sorted(ROOT.glob(pattern))]
NAMES = [str(path.relative_to(ROOT)) for path in PAGES]
LINK = re.compile(r"\]\(([^)\s]+)\)")
OPTION = re.compile(r"(?<![\w-])--([A-Za-z]\w*(?:-\w+)*)")
# Options in our pages that are those of launchers, of pip and docker, and of tools.
OTHERS = {
    *("num_gpus", "module", "hostfile", "no_ssh", "node_rank", "master_addr", "master_port"),
    *("nproc_per_node", "partition", "signal", "help"),
    *("no-deps", "wheel-dir", "no-build-isolation", "extra-index-url", "no-index", "find-links"),
    *("rm", "gpus", "ipc", "shm-size", "entrypoint", "device", "ulimit"),
    *("enable-lora", "lora-modules", "max-lora-rank", "model-path", "lora-paths", "model-id"),
    *("trajectories", "logdir", "layers", "parts", "limit", "target", "engine", "private"),
    "rounds",
}


def headings(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name) if name else page
        assert target.exists(), f"{link}: there is no such file"
        assert not anchor or anchor in headings(target), f"{link}: there is no such heading"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_lines_are_at_most_120_characters(page: Path) -> None:
    """Except rows of tables and code."""
    lines = enumerate(page.read_text().splitlines(), start=1)
    assert not [n for n, line in lines if len(line) > 120 and not line.startswith(("|", "    "))]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_options_in_pages_exist() -> None:
    tools = (
        PlanArguments,
        DoctorArguments,
        CompareArguments,
        ExportArguments,
        Figure1Arguments,
        Figure2Arguments,
    )
    groups: tuple[Any, ...] = (*GROUPS, *tools)
    ours = {each.name for group in groups for each, _ in declarations(group)}
    for page in PAGES:
        assert set(OPTION.findall(page.read_text())) <= ours | OTHERS, page


def test_the_page_of_options_is_that_of_the_declarations() -> None:
    written = (ROOT / "docs" / "options.md").read_text()
    assert written == options_page(), "run python tools/options_page.py"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_in_the_table_of_methods(method: str) -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    table, _, _ = page.partition("\n## ")
    assert f"\n| `{method}` |" in table
