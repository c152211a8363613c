"""The snippets of docs/resilience.md run."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from beluga_airflow import run

PAGE = (Path(__file__).resolve().parents[2] / "docs/resilience.md").read_text()


def test_the_snippets_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for text in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(text, names)  # noqa: S102  # our own page
    asyncio.run(names["main"]())  # type: ignore[operator]  # the page defines it
    assert capsys.readouterr().out == "{'paid': 7}\n"
    result = asyncio.run(run(names["flow"], {"amount": 7}))  # type: ignore[arg-type]  # and that
    assert (result.status, result.data["paid"]) == ("completed", 7)
