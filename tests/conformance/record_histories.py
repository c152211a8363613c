"""Records what test_replay.py replays: the histories of the examples on today's code.

Run it from the repository's root for new examples: ``python -m tests.conformance.record_histories``. Where the workflow
code was changed so that it is meant to take another course, remove the histories that it changes before; those of
released versions stay, under names of their own.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

from beluga_airflow.testing import TemporalServer
from tests.conformance.examples import EXAMPLES
from tests.conformance.expected import Example
from tests.conformance.runtimes import AT_ONCE, run_on_temporal, temporal_side
from tests.temporal.record_histories import _without_place as without_place

FOLDER = Path(__file__).parent / "histories"
LONGEST = 200_000
"""Bytes: an example with more data than that takes the course of another, with less."""


def missing() -> list[Example]:
    """The examples that are not recorded yet."""
    return [example for example in EXAMPLES if not (FOLDER / f"{example.name}.json").exists()]


async def main() -> None:
    places = asyncio.Semaphore(AT_ONCE)
    with TemporalServer() as server:
        async with temporal_side(server, "recorded") as side:

            async def record(example: Example) -> None:
                async with places:
                    # the folder of the trace is in the history, so it is a relative one
                    _, run = await run_on_temporal(example, example.name, side, workflow_id=example.name)
                    history = json.loads((await side.handle(run).fetch_history()).to_json())
                text = json.dumps(without_place(history), separators=(",", ":"))
                if len(text) < LONGEST:
                    (FOLDER / f"{example.name}.json").write_text(text + "\n")

            await asyncio.gather(*(record(example) for example in missing()))


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        for example in missing():
            Path(example.name).mkdir()
        asyncio.run(main())
