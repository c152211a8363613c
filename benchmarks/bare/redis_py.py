"""redis-py's asyncio client: a hash a key, a counter, and a stream; one script for each kind of write."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any
from uuid import uuid4

from redis.asyncio import Redis

from bare import HISTORY, Pair
from beluga_airflow.state.redis import RedisStore

__all__ = ["BareRedis", "PlainRedis", "pair"]

URL = os.environ.get("BELUGA_TEST_REDIS_URL", "redis://localhost:6379/9")

SET = f"""
local version = redis.call('INCR', KEYS[2])
redis.call('HSET', KEYS[1], 'value', ARGV[1], 'version', version)
redis.call('XADD', KEYS[3], 'MAXLEN', {HISTORY}, version .. '-0', 'key', KEYS[1], 'value', ARGV[1])
return version
"""
SWAP = f"if redis.call('HGET', KEYS[1], 'version') ~= ARGV[2] then return false end {SET}"


class PlainRedis:
    """See ``Plain``."""

    def __init__(self, client: Redis, namespace: str) -> None:
        self._client = client
        self._namespace = namespace

    async def get(self, key: str) -> Any:
        return json.loads(await self._client.get(self._namespace + key))

    async def set(self, key: str, value: Any) -> None:
        await self._client.set(self._namespace + key, json.dumps(value))


class BareRedis:
    """See ``Bare``."""

    def __init__(self, client: Redis, namespace: str) -> None:
        self._client = client
        self._namespace = namespace
        self._set, self._swap = client.register_script(SET), client.register_script(SWAP)

    async def get(self, key: str) -> Any:
        text, _ = await self._client.hmget(self._namespace + key, "value", "version")
        return json.loads(text)

    async def set(self, key: str, value: Any) -> int:
        return await self._set(self._names(key), [json.dumps(value)])

    async def compare_and_swap(self, key: str, value: Any, *, version: int) -> int | None:
        return await self._swap(self._names(key), [json.dumps(value), version])

    async def watch(self, key: str) -> AsyncGenerator[Any]:
        name, counter, stream = self._names(key)
        last = f"{await self._client.get(counter)}-0"
        yield await self.get(key)
        while True:
            for _, entries in await self._client.xread({stream: last}, block=1_000, count=1_000):
                for number, fields in entries:
                    last = number
                    if fields["key"] == name:
                        yield json.loads(fields["value"])

    def _names(self, key: str) -> list[str]:
        return [self._namespace + name for name in (key, " version", " changes")]


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    """Two namespaces, removed in the end.

    Raises:
        StateUnavailable: the server does not answer.
    """
    namespace = f"beluga-bench-{uuid4().hex}:"
    where = f"{URL}{'&' if '?' in URL else '?'}namespace={namespace}ours:"
    store, reader = RedisStore(where), RedisStore(where)
    # with a timeout of its own for reading, redis-py 8.1 sometimes swallows the cancellation that ends a watch
    client = Redis.from_url(URL, decode_responses=True, socket_timeout=None)
    try:
        await store.get("whether it answers")
        versions = {"redis-py": version("redis"), "Redis": (await client.info("server"))["redis_version"]}
        bare, plain = BareRedis(client, f"{namespace}bare:"), PlainRedis(client, f"{namespace}plain:")
        yield Pair(name="Redis", ours=store, bare=bare, plain=plain, reader=reader, url=where, versions=versions)
        async for name in client.scan_iter(f"{namespace}*", count=1_000):
            await client.delete(name)
    finally:
        await client.aclose()
        await reader.close()
        await store.close()
