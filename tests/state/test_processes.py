"""A store that several processes share: what all of them write is seen by all, in one order."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import defaultdict
from contextlib import aclosing
from pathlib import Path

from beluga_airflow.state import StateStore, open_store
from tests.state.backends import Place

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 120


async def writer(url: str, name: str, count: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.state.writer", url, name, str(count)),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=asyncio.subprocess.PIPE,
    )


async def told(process: asyncio.subprocess.Process, *, kill_at: int | None = None) -> int:
    """How many numbers a writer said that it had written."""
    assert process.stdout is not None
    count = 0
    async for _ in process.stdout:
        count += 1
        if count == kill_at:
            process.kill()
    await process.wait()
    return count


async def test_what_several_processes_write_is_seen_in_one_order(shared_place: Place) -> None:
    url = shared_place.url()
    store = open_store(url)
    async with (
        asyncio.timeout(DEADLINE),
        aclosing(store.watch("w", prefix=True, after=await store.set("begin", 1))) as watch,
    ):
        writers = [await writer(url, f"w{number}", 400) for number in range(3)]
        counts = asyncio.gather(*(told(process) for process in writers))
        seen: defaultdict[str, list[int]] = defaultdict(list)
        versions = []
        for _ in range(1_200):
            change = await anext(watch)
            seen[change.key.partition("/")[0]].append(change.value)
            versions.append(change.version)
        assert await counts == [400] * 3
    assert seen == {f"w{number}": list(range(400)) for number in range(3)}
    assert versions == list(range(versions[0], versions[0] + 1_200))
    await store.close()


async def test_a_writer_that_is_killed_harms_nobody(shared_place: Place) -> None:
    url = shared_place.url()
    store = open_store(url)
    begin = await store.set("begin", 1)
    async with asyncio.timeout(DEADLINE):
        killed, whole = await writer(url, "killed", 5_000), await writer(url, "whole", 300)
        written, count = await asyncio.gather(told(killed, kill_at=100), told(whole))
        assert (killed.returncode, count) == (-9, 300)
        await store.set("end", 1)
        seen = await until_end(store, begin)
    assert seen["whole"] == list(range(300))
    # all that it said; one more may have been written and not said
    assert seen["killed"] in (list(range(written)), list(range(written + 1)))
    await store.close()


async def until_end(store: StateStore, after: int) -> dict[str, list[int]]:
    seen: defaultdict[str, list[int]] = defaultdict(list)
    async with aclosing(store.watch("", prefix=True, after=after)) as watch:
        async for change in watch:
            if change.key == "end":
                break
            seen[change.key.partition("/")[0]].append(change.value)
    return seen
