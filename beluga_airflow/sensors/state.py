"""A task that waits for a key of a state store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from datetime import timedelta
from typing import Any

from airflow.sdk import BaseSensorOperator, Context, PokeReturnValue
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowSkipException

from beluga_airflow.errors import BelugaError, HistoryLost, InvalidSetting, StateError
from beluga_airflow.graph.decision import UNSET
from beluga_airflow.hooks.state import StateHook
from beluga_airflow.triggers.condition import Condition
from beluga_airflow.triggers.state import StateTrigger

__all__ = ["StateSensor"]

PATIENCE = 10.0
"""Seconds that a worker waits for the store's answer to one look."""


class StateSensor(BaseSensorOperator):
    """Waits until a key is there, or its value equals another, or satisfies a predicate; returns the value.

    Looks once on a worker; then waits in the triggerer, without a worker and without polling, and sees every change
    since that look in turn: also a value that did not stay. The task ends in the triggerer too, unless its value is
    large (50,000 characters of JSON) or an outlet or ``post_execute`` needs a worker. A store that is away is waited
    for, as long as ``timeout``. ``timeout``, ``soft_fail``, ``never_fail`` and retries are those of all sensors: each
    attempt has the whole ``timeout``, and one that used it up is not retried.

    Args:
        key: which; templated.
        equals: the JSON value it must have, in which true is not 1; None means a stored null, which a missing key is
            not; templated. Left out: any value.
        predicate: import path of a plain function, ``"package.module:name"``, that takes the value and says whether the
            wait is over. It runs on a worker and in the triggerer and must be importable there and where DAGs are
            parsed. What it raises fails the attempt.
        state_conn_id: the store's connection.
        deferrable: whether to wait in the triggerer; else the worker looks every ``poke_interval`` seconds, as ``mode``
            says.

    Raises:
        InvalidSetting: both ``equals`` and ``predicate`` are given, or the predicate is not there.
    """

    template_fields: Sequence[str] = ("key", "equals")
    ui_color = "#e0f2f1"

    def __init__(
        self,
        *,
        key: str,
        equals: Any = UNSET,
        predicate: str | None = None,
        state_conn_id: str = StateHook.default_conn_name,
        deferrable: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # a predicate that is not there is an import error of the DAG
        Condition(equals=equals, predicate=predicate).check()
        self.key = key
        self.equals = equals
        self.predicate = predicate
        self.state_conn_id = state_conn_id
        self.deferrable = deferrable

    @property
    def condition(self) -> Condition:
        """What is waited for, once the templates are rendered."""
        return Condition(equals=self.equals, predicate=self.predicate)

    def poke(self, context: Context) -> PokeReturnValue:  # noqa: ARG002  # Airflow's signature
        """Look once."""
        try:
            _, found = asyncio.run(self._look())
        except BelugaError as error:
            raise _failing(error) from error
        return found

    def execute(self, context: Context) -> Any:
        """Wait."""
        if not self.deferrable:
            return super().execute(context)
        after, found = self._first_look()
        if found:
            return found.xcom_value
        return self.defer(
            trigger=StateTrigger(
                key=self.key,
                condition=self.condition.to_json(),
                after=after,
                state_conn_id=self.state_conn_id,
                # an end in the triggerer knows nothing of these
                on_worker=bool(self.outlets) or self._post_execute_hook is not None,
                push=self.do_xcom_push,
            ),
            method_name="execute_complete",
            timeout=timedelta(seconds=self.timeout),
        )

    def execute_complete(self, context: Context, event: dict[str, Any]) -> Any:  # noqa: ARG002  # Airflow's signature
        """Go on after the wait, where a worker is needed for that."""
        if "error" in event:
            raise AirflowFailException(event["error"]) if event["is_setting"] else AirflowException(event["error"])
        try:
            return asyncio.run(self._value_of(event["version"]))
        except BelugaError as error:
            raise _failing(error) from error

    def _first_look(self) -> tuple[int | None, PokeReturnValue]:
        """What a look finds, and at which version."""
        try:
            return asyncio.run(self._look())
        except BelugaError as error:
            failure = _failing(error)
            if self.never_fail or (self.soft_fail and isinstance(failure, AirflowFailException)):
                raise AirflowSkipException(f"skipped, as soft_fail or never_fail say: {error}") from error
            raise failure from error

    async def _look(self) -> tuple[int | None, PokeReturnValue]:
        if not isinstance(self.key, str) or not self.key.strip():
            raise InvalidSetting(f"key= is {self.key!r}, which is no key once its templates are rendered; see to them")
        self.condition.check_value()
        store = await StateHook(self.state_conn_id).store()
        try:
            async with asyncio.timeout(PATIENCE), aclosing(store.watch(self.key)) as changes:
                change = await anext(changes)
        except TimeoutError:
            self.log.warning("the state store %s does not answer within %g s; it is waited for", store.url, PATIENCE)
            return None, PokeReturnValue(False)
        finally:
            await store.close()
        is_met = await self.condition.holds(change)
        return change.version, PokeReturnValue(is_met, change.value if is_met else None)

    async def _value_of(self, version: int) -> Any:
        """What the change of this version set.

        Raises:
            StateError: it was changed since, and is not kept any more.
        """
        store = await StateHook(self.state_conn_id).store()
        try:
            found = await store.get_versioned(self.key)
            if found is not None and found.version == version:
                return found.value
            async with aclosing(store.watch(self.key, after=version - 1)) as changes:
                return (await anext(changes)).value
        except HistoryLost as error:
            raise StateError(
                f"state key {self.key!r} was what the task waits for in version {version}, but its value was replaced "
                f"and is not kept any more; run the task again: {error}"
            ) from error
        finally:
            await store.close()


def _failing(error: BelugaError) -> AirflowException:
    """What Airflow tries again, unless somebody has to mend a setting first."""
    return AirflowFailException(str(error)) if isinstance(error, InvalidSetting) else AirflowException(str(error))
