"""A process that writes numbers into a store, one after the other: ``python -m tests.state.writer URL NAME COUNT``."""

from __future__ import annotations

import asyncio
import sys

from beluga_airflow.state import open_store


async def main(url: str, name: str, count: int) -> None:
    store = open_store(url)
    for number in range(count):
        await store.set(f"{name}/{number % 5}", number)
        # what was told to be written must be there, whatever becomes of this process
        print(number, flush=True)
    await store.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
