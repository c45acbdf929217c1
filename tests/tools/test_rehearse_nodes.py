"""The rehearsal on many nodes, on two small ones."""

from __future__ import annotations

import warnings

import pytest

from tools import rehearse_nodes
from tools.rehearse import nodes


@pytest.mark.heavy
def test_a_rehearsal_of_two_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    """A mesh of two replicas; then one node, whose ranks hold the model once."""
    try:
        rehearse_nodes.main(["--engines", "hybrid", "--nodes", "2", "--ranks_of_each", "2"])
    except nodes.NoNamespaces as reason:
        warnings.warn(f"NOT TESTED over a network: no namespaces here: {reason}", stacklevel=2)
        pytest.skip(f"network namespaces take root and iproute2: {reason}")
    *_, row = capsys.readouterr().out.splitlines()
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:2] == ["hybrid", "2 × 2"]
    assert "not named" not in row
    found = dict(zip(rehearse_nodes.HEADS, cells, strict=True))
    assert float(found["next loss differs"]) < 1e-5
    assert float(found["save, s"]) < 30
    assert 0 < float(found["idle, kB/s"]) < 50
