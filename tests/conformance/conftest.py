"""The runs of all examples, runtime by runtime."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from beluga_airflow.testing import TemporalServer
from tests.conformance.examples import EXAMPLES
from tests.conformance.runtimes import Runs, by_operator, by_run, on_temporal
from tests.conformance.task_groups import as_task_groups


@pytest.fixture(scope="module")
def runs(temporal_server: TemporalServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runs]:
    """How the examples ended on a runtime; they are run when it is first asked."""
    ended: dict[str, Runs] = {}

    def on(runtime: str) -> Runs:
        if runtime not in ended:
            folder = tmp_path_factory.mktemp(runtime.replace(" ", "-"))
            ended[runtime] = asyncio.run(_run(runtime, folder, temporal_server))
        return ended[runtime]

    return on


async def _run(runtime: str, folder: Path, server: TemporalServer) -> Runs:
    examples = [example for example in EXAMPLES if runtime not in example.cannot_show]
    for example in examples:
        (folder / example.name).mkdir()
    match runtime:
        case "run":
            return await by_run(examples, folder)
        case "operator":
            return await by_operator(examples, folder)
        case "temporal":
            return await on_temporal(examples, folder, server)
        case _:
            return await as_task_groups(examples, folder)
