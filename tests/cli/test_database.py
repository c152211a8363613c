"""The sessions of the stack's Airflow, with Airflow's own audit log on a real SQLite file."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from types import SimpleNamespace

import httpx
import pytest
from airflow import settings
from airflow.api_fastapi.common.db.common import SessionDep
from airflow.api_fastapi.core_api.security import get_user
from airflow.api_fastapi.logging.decorators import action_logging
from airflow.jobs.job import Job
from airflow.models.log import Log
from fastapi import Depends, FastAPI
from sqlalchemy import create_engine, select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from beluga_airflow.cli.database import sessions

LOCKED_SECONDS = 3.0


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    engine = create_engine(
        f"sqlite:///{tmp_path / 'airflow.db'}?timeout={LOCKED_SECONDS}", connect_args={"check_same_thread": False}
    )
    Log.metadata.create_all(engine, [Log.__table__, Job.__table__])
    monkeypatch.setattr(settings, "NonScopedSession", sessions(engine))
    yield engine
    engine.dispose()


def server(wrote: threading.Event, logs: threading.Event) -> FastAPI:
    """An API server that a task writes to while a user changes something, at the worst moment.

    What the task wrote is flushed, and the event loop logs the user's action before it can have that committed.
    """
    app = FastAPI()

    def user() -> SimpleNamespace:
        return SimpleNamespace(get_name=lambda: "user")

    async def user_at_once() -> SimpleNamespace:
        logs.set()
        return user()

    app.dependency_overrides[get_user] = user_at_once

    @app.post("/task")
    def task(session: SessionDep) -> None:
        session.add(Log(event="task"))
        session.flush()
        wrote.set()
        assert logs.wait(10)

    @app.post("/change", dependencies=[Depends(action_logging("change"))])
    def change(session: SessionDep) -> None:
        session.add(Log(event="changed"))

    @app.post("/refuse", dependencies=[Depends(action_logging("refuse"))])
    def refuse(session: SessionDep) -> None:
        session.add(Log(event="refused"))
        raise RuntimeError("refused")

    return app


def logged(engine: Engine) -> list[str]:
    with Session(engine) as session:
        return sorted(session.scalars(select(Log.event)))


async def test_a_users_change_does_not_lock_out_what_a_task_writes(engine: Engine) -> None:
    wrote, logs = threading.Event(), threading.Event()
    transport = httpx.ASGITransport(server(wrote, logs), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://airflow") as http:
        begun = monotonic()
        task = asyncio.create_task(http.post("/task"))
        assert await asyncio.to_thread(wrote.wait, 10)
        changed = await http.post("/change", json={"is_paused": False})
        wrote_it = await task
        took = monotonic() - begun

    assert (changed.status_code, wrote_it.status_code) == (200, 200)
    assert took < LOCKED_SECONDS
    assert logged(engine) == ["change", "changed", "task"]


async def test_a_change_that_fails_is_not_logged(engine: Engine) -> None:
    transport = httpx.ASGITransport(server(threading.Event(), threading.Event()), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://airflow") as http:
        assert (await http.post("/refuse", json={})).status_code == 500

    assert logged(engine) == []


def write(engine: Engine, *rows: Log | Job) -> None:
    session = sessions(engine)()
    session.add_all(rows)
    session.commit()
    session.close()


async def test_what_else_is_committed_is_committed_at_once(engine: Engine) -> None:
    await asyncio.to_thread(write, engine, Log(event="on a thread"))
    assert logged(engine) == ["on a thread"]

    write(engine, Log(event="on the event loop"), Job(state="running"))
    assert logged(engine) == ["on a thread", "on the event loop"]
