"""The versions of libraries, for checkpoints, reports and checks."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

import scalora_dist


def installed_versions(*names: str) -> dict[str, str]:
    """{library: its version} of those of ``names`` that are installed.

    This package's own version is known in a clone that is not installed too.
    """
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name == scalora_dist.__name__:
                found[name] = scalora_dist.__version__
    return found
