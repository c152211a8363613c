"""The DAGs' package on the path, as in a DAG's process, and a ledger for each test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "dags"))


@pytest.fixture(autouse=True)
def ledger_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the ledger of this test is."""
    path = tmp_path / "ledger.db"
    monkeypatch.setenv("BELUGA_LEDGER", str(path))
    return path


@pytest.fixture
def demo_file() -> Path:
    """The orders of the demo."""
    return ROOT / "dags" / "data" / "orders.csv"


@pytest.fixture
def real_file() -> Path:
    """A month of a real shop."""
    path = ROOT.parent / "shared" / "data" / "online-retail" / "2010-12.csv.gz"
    if not path.exists():
        pytest.skip("the month of real orders is not on this machine")
    return path
