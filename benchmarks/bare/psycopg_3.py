"""psycopg's asyncio connection: one statement for each kind of write, told of by NOTIFY."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from importlib.metadata import version
from typing import Any
from uuid import uuid4

from psycopg import AsyncConnection, OperationalError, sql

from bare import Pair
from beluga_airflow.errors import StateUnavailable
from beluga_airflow.state.postgres import PostgresStore

__all__ = ["BarePostgres", "PlainPostgres", "pair"]

URL = os.environ.get("BELUGA_TEST_POSTGRES_URL", "postgresql://localhost:5432/postgres")

SCHEMA = """
CREATE TABLE plain (key text PRIMARY KEY, value text NOT NULL);
CREATE TABLE entry (key text PRIMARY KEY, value text NOT NULL, version bigint NOT NULL);
CREATE TABLE change (version bigint PRIMARY KEY, key text NOT NULL, value text NOT NULL);
CREATE TABLE counter (last bigint NOT NULL);
INSERT INTO counter VALUES (0);
"""
# nothing is pruned: no more is written here than a history holds
SET = """
WITH next AS (UPDATE counter SET last = last + 1 {} RETURNING last),
    log AS (INSERT INTO change SELECT last, %(key)s, %(value)s FROM next),
    written AS (
        INSERT INTO entry SELECT %(key)s, %(value)s, last FROM next
        ON CONFLICT (key) DO UPDATE SET value = excluded.value, version = excluded.version
        RETURNING version
    )
SELECT version, pg_notify(current_schema, version::text) FROM written
"""
IF_SAME = "WHERE EXISTS (SELECT FROM entry WHERE key = %(key)s AND version = %(version)s)"


class PlainPostgres:
    """See ``Plain``."""

    def __init__(self, db: AsyncConnection) -> None:
        self._db = db

    async def get(self, key: str) -> Any:
        row: Any = await (await self._db.execute("SELECT value FROM plain WHERE key = %s", [key])).fetchone()
        return json.loads(row[0])

    async def set(self, key: str, value: Any) -> None:
        statement = "INSERT INTO plain VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET value = excluded.value"
        await self._db.execute(statement, [key, json.dumps(value)])


class BarePostgres:
    """See ``Bare``."""

    def __init__(self, db: AsyncConnection, ear: AsyncConnection) -> None:
        self._db = db
        self._ear = ear

    async def get(self, key: str) -> Any:
        row = await self._row("SELECT value, version FROM entry WHERE key = %s", [key])
        return json.loads(row[0])

    async def set(self, key: str, value: Any) -> int:
        return (await self._row(SET.format(""), {"key": key, "value": json.dumps(value)}))[0]

    async def compare_and_swap(self, key: str, value: Any, *, version: int) -> int | None:
        values = {"key": key, "value": json.dumps(value), "version": version}
        row = await self._row(SET.format(IF_SAME), values)
        return row and row[0]

    async def watch(self, key: str) -> AsyncGenerator[Any]:
        [schema] = await self._row("SELECT current_schema", [])
        await self._ear.execute(sql.SQL("LISTEN {}").format(sql.Identifier(schema)))
        [last] = await self._row("SELECT last FROM counter", [])
        yield await self.get(key)
        async with aclosing(self._ear.notifies()) as told:
            async for _ in told:
                statement = "SELECT version, key, value FROM change WHERE version > %s ORDER BY version"
                for number, name, text in await (await self._db.execute(statement, [last])).fetchall():
                    last = number
                    if name == key:
                        yield json.loads(text)

    async def _row(self, statement: Any, values: Any) -> Any:
        return await (await self._db.execute(statement, values)).fetchone()


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    """Two schemas, dropped in the end.

    Raises:
        StateUnavailable: the server does not answer.
    """
    schemas = [f"beluga_bench_{uuid4().hex}_{side}" for side in ("ours", "bare")]
    at_ours, by_hand = (f"{URL}{'&' if '?' in URL else '?'}options=-csearch_path%3D{schema}" for schema in schemas)
    try:
        connecting = await AsyncConnection.connect(URL, autocommit=True, connect_timeout=3)
    except OperationalError as error:
        said = str(error).splitlines()[0]
        raise StateUnavailable(f"PostgreSQL at {PostgresStore(URL).url} does not answer: {said}") from error
    async with connecting as admin:
        for schema in schemas:
            await admin.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
        store, reader = PostgresStore(at_ours), PostgresStore(at_ours)
        db, ear = [await AsyncConnection.connect(by_hand, autocommit=True) for _ in range(2)]
        try:
            await db.execute(SCHEMA)
            [[server]] = await (await db.execute("SELECT split_part(version(), ' ', 2)")).fetchall()
            versions = {"psycopg": version("psycopg"), "PostgreSQL": server}
            bare, plain = BarePostgres(db, ear), PlainPostgres(db)
            yield Pair(
                name="PostgreSQL", ours=store, bare=bare, plain=plain, reader=reader, url=at_ours, versions=versions
            )
        finally:
            await db.close()
            await ear.close()
            await reader.close()
            await store.close()
            for schema in schemas:
                await admin.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(schema)))
