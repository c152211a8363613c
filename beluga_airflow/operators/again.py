"""Running again from one step: what the steps before it did in an earlier run is taken as it is."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from airflow.sdk import Context

from beluga_airflow.errors import InvalidInput, InvalidSetting
from beluga_airflow.graph import Identity, Shape
from beluga_airflow.graph.earlier import EarlierRun
from beluga_airflow.operators.runs import identity_of, run_name

__all__ = ["STEPS", "Again", "identity_behind", "leave"]

log = logging.getLogger(__name__)

STEPS = "steps"
"""The XCom under which a task leaves what its steps did."""
STEPS_LIMIT = 1_000_000
"""Characters of JSON that a task leaves there: all of it lies in Airflow's database."""
SAME = (
    "they run again with the same idempotency keys, and a service that honours these answers with what was undone; see "
    "that it is done anew, or run the order whole under another key"
)
OTHER = "they run again with idempotency keys of their own"
"""What a run again means for steps that were undone."""
TOO_LARGE = "too_large"
"""Stands in that XCom in place of what is larger, with its size."""
TOLD, SHOWN = 20, 200
"""How many keys of an input a log names, and how many characters of a text from outside it shows."""


def leave(context: Context, run: EarlierRun) -> None:
    """Leave for a later run what this one did, where Airflow's database can hold it."""
    left = run.to_json()
    size = len(json.dumps(left))
    if size > STEPS_LIMIT:
        log.warning(
            "this run cannot be run again from one step later: its input and what its steps returned are %.1f MB, "
            "and a task leaves %g MB; keep what is large in a file or a table, and pass its name",
            size / 1e6,
            STEPS_LIMIT / 1e6,
        )
        left = {TOO_LARGE: size}
    context["ti"].xcom_push(key=STEPS, value=left)


class Again:
    """From which step to run again, and after which DAG run.

    Args:
        from_step: the path of the step, or of a nested flow's node; nothing (or a template that came out empty): the
            flow runs whole.
        of_run: the id of an earlier DAG run of this DAG.

    Raises:
        InvalidSetting: one of them is given without the other.
    """

    def __init__(self, from_step: str | None, of_run: str | None) -> None:
        self.from_step, self.of_run = (None if value in (None, "", "None") else value for value in (from_step, of_run))
        if (self.from_step is None) != (self.of_run is None):
            raise InvalidSetting(
                f"again_from={from_step!r} and again_run={of_run!r} go together: a step to begin with, and the id of "
                "the DAG run whose earlier steps stand"
            )

    def __bool__(self) -> bool:
        return self.from_step is not None

    @contextmanager
    def carrying(self) -> Iterator[None]:
        """While a call is sent in which travels what stands: an error of its size says what to do.

        Raises:
            InvalidInput: the call was refused with one.
        """
        try:
            yield
        except InvalidInput as error:
            if not self:
                raise
            raise InvalidInput(
                f"{error}; what stands of DAG run {self.of_run!r} travels in it: run it whole"
            ) from error

    def pulled(self, context: Context, key: str) -> Any:
        """An XCom that this task left in the earlier run."""
        ti = context["ti"]
        index = -1 if ti.map_index is None else ti.map_index
        return ti.xcom_pull(task_ids=ti.task_id, key=key, run_id=self.of_run, map_indexes=index)

    def left(self, context: Context) -> EarlierRun | None:
        """What ``leave`` left in the earlier run.

        Raises:
            InvalidSetting: it was too large.
        """
        left = self.pulled(context, STEPS)
        if left is not None and TOO_LARGE in left:
            raise InvalidSetting(
                f"DAG run {self.of_run!r} cannot be run again from one step: its input and what its steps returned "
                f"are {left[TOO_LARGE] / 1e6:.1f} MB, and a task leaves {STEPS_LIMIT / 1e6:g} MB; run it whole"
            )
        return None if left is None else EarlierRun.from_json(left)

    def begun(
        self,
        context: Context,
        shape: Shape,
        earlier: EarlierRun | None,
        *,
        given: Mapping[str, Any],
        key: str | None,
        key_is_field: bool,
    ) -> EarlierRun:
        """What stands of the earlier run: its input, its scope, and the outcomes that ``EarlierRun.kept`` says.

        Args:
            context: of this task.
            shape: of the flow as it is now.
            earlier: what the earlier run left; None: nothing.
            given: this run's own input, as JSON.
            key, key_is_field: the business key, as ``identity_of`` takes it.

        Raises:
            InvalidSetting: there is no such step, or no such run, or the flow has changed since.
            InvalidInput: the business key names another item than in the earlier run.
        """
        assert self.from_step is not None, "it runs again"
        earlier = self._fitting(shape, earlier)
        if key is not None:
            # a run without one is named by its DAG run, which this one never is
            now = identity_of(context, shape.flow, earlier.inputs, key=key, key_is_field=key_is_field, generation=0)
            self._check_item(now.scope, earlier.scope)
        self._tell_of_input(earlier.inputs, given)
        # what was undone is done again, which its old key would forbid; what may stand needs that key
        same_keys = key is not None or bool(earlier.doubtful) or not earlier.undone
        for step, why in earlier.doubtful.items():
            log.warning(
                "nobody knows whether step %r of DAG run %r was undone (%s): it runs again, with the same idempotency "
                "key; nothing is done twice only where that is honoured",
                step,
                self.of_run,
                _short(why),
            )
        if undone := [step for step, how in earlier.undone.items() if how == "undone"]:
            log.warning(
                "undone in DAG run %r were %s: %s", self.of_run, ", ".join(undone), SAME if same_keys else OTHER
            )
        kept = earlier.kept(shape, self.from_step)
        stand = ", ".join(kept) or "nothing"
        log.info("running again from %r; from DAG run %r stand: %s", self.from_step, self.of_run, stand)
        return replace(earlier, scope=earlier.scope if same_keys else "", outcomes=kept, undone={})

    def _fitting(self, shape: Shape, earlier: EarlierRun | None) -> EarlierRun:
        if not shape.rerun_from(str(self.from_step)):
            names = [*shape.order, *(group.path for group in shape.groups)]
            raise InvalidSetting(
                f"flow {shape.flow!r} has no step {self.from_step!r} to run again from; it has: {', '.join(names)}"
            )
        if earlier is None:
            raise InvalidSetting(f"this task left nothing in DAG run {self.of_run!r}; see that the run's id is right")
        if earlier.fingerprint != shape.fingerprint:
            raise InvalidSetting(f"flow {shape.flow!r} has changed since DAG run {self.of_run!r}: run it whole")
        return earlier

    def _check_item(self, now: str, then: str) -> None:
        if now != then:
            raise InvalidInput(
                f"the item named by the key is another one: now {_short(now)}, in DAG run {self.of_run!r} "
                f"{_short(then)}; give the same key, or run this one whole"
            )

    def _tell_of_input(self, earlier: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        nothing = object()
        differing = [key for key in {**earlier, **given} if earlier.get(key, nothing) != given.get(key, nothing)]
        if differing:
            # not the values: some are nobody's business
            told = ", ".join(map(_short, differing[:TOLD])) + (", ..." if len(differing) > TOLD else "")
            log.warning("running again with the input of DAG run %r; this run's own differs in: %s", self.of_run, told)


def identity_behind(stands: EarlierRun, own: Identity, context: Context) -> Identity:
    """The identity of a run again: what stands was done, and is undone, under the earlier run's idempotency keys.

    After an undoing the keys are the run's own: then nothing stands that could be undone.

    It counts as a clear, so that what it decides is decided anew, in records that are its own.
    """
    return replace(own, scope=stands.scope or own.scope, generation=own.generation + 1, run=run_name(context))


def _short(text: str) -> str:
    """Text from outside, harmless in one line of a log."""
    shown = ascii(text)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
