"""How the stack's Airflow uses its SQLite database; Airflow imports this, by ``[database] sql_alchemy_session_maker``.

An API server commits its audit log on its event loop. While a task's write is flushed and not committed, SQLite makes
that wait; but the write is committed only when the event loop goes on. So both stand still until SQLite gives up,
``timeout`` seconds later, and then one of them fails. Other databases lock rows, and know nothing of this.
"""

from __future__ import annotations

import asyncio

from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, sessionmaker

__all__ = ["sessions"]


def sessions(engine: Engine) -> sessionmaker[Session]:
    """Airflow's usual sessions, but for the audit log: on an event loop it is left to the commit of the change itself.

    That comes at the end of the request, on a thread, which may wait. A change that fails is not in the audit log.
    """
    return sessionmaker(engine, class_=_Session, autoflush=False, expire_on_commit=False)


class _Session(Session):
    def commit(self) -> None:
        if not (_on_event_loop() and self._has_only_logs()):
            super().commit()

    def _has_only_logs(self) -> bool:
        from airflow.models.log import Log  # Airflow's settings import this module, and its models its settings

        return bool(self.new) and all(isinstance(each, Log) for each in self.new)


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
