"""Operators that end at once when Airflow tells their task to."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from typing import Any, ClassVar

from airflow.sdk import BaseAsyncOperator, Context
from airflow.sdk.exceptions import AirflowException

__all__ = ["Endable"]


class Endable(BaseAsyncOperator):
    """Does its work in an event loop, and leaves it when the task is to end: its machine goes away, or a user acted.

    Attributes:
        left: what becomes of the work then, as a clause for the error.
    """

    left: ClassVar[str]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._at_work: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None
        self._is_told_to_end = False

    async def aexecute(self, context: Context) -> Any:
        """Do the work.

        Raises:
            AirflowException: the task was told to end.
        """
        task = asyncio.current_task()
        assert task is not None, "an event loop runs coroutines in tasks"
        self._at_work = asyncio.get_running_loop(), task
        try:
            return await self.work(context)
        except asyncio.CancelledError:
            if not self._is_told_to_end:
                raise
            raise AirflowException(
                f"the task was told to end (SIGTERM, or somebody acted on it): {self.left}"
            ) from None
        finally:
            self._at_work = None

    @abstractmethod
    async def work(self, context: Context) -> Any:
        """What the task does, and what it returns."""

    def on_kill(self) -> None:
        """Airflow wants the task to end."""
        if self._at_work is not None:
            loop, task = self._at_work
            self._is_told_to_end = True
            # in a signal's handler, between any two instructions: wake the loop, and touch nothing of it
            loop.call_soon_threadsafe(task.cancel)
