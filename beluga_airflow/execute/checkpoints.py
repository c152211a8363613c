"""Checkpoints: what keeps how far a run has come, and the one rule for a flow that has changed since."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from beluga_airflow.errors import InvalidFlow
from beluga_airflow.graph.shape import UNDO, Shape

__all__ = ["KEPT", "Checkpoint", "begin_anew", "entry_names"]

log = logging.getLogger(__name__)

KEPT = 30 * 86_400.0
"""Seconds that what a run needs to go on stays in the state store after it was written last: longer than runs take, and
than people take to look at a failed one. Airflow keeps its own task state as long."""


class Checkpoint(Protocol):
    """Where it is kept how far a run has come, so that a lost one goes on behind its finished steps.

    An entry is JSON: the outcome of a step under its path; under ``undo`` the result of a flow that failed or was
    cancelled, before anything is undone; under ``step.undo`` that a step was undone.
    """

    async def load(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The entries kept so far, of those named."""
        ...

    async def save(self, name: str, entry: dict[str, Any]) -> None:
        """Keep one; when this returns, it survives the loss of the process."""
        ...


def entry_names(shape: Shape) -> list[str]:
    """The names of all entries that a run of this shape may have."""
    undos = [f"{step.name}.{UNDO}" for step in shape.steps if step.undo]
    return [*shape.order, *undos, *([UNDO] if undos else [])]


def begin_anew(entries: Mapping[str, Mapping[str, Any]], *, flow: str, before: str, now: str, again: str) -> None:
    """Let a run begin anew whose checkpoint is of another shape, as those outcomes could lead past today's steps.

    Args:
        entries: of that checkpoint, as ``Checkpoint`` describes them; where it has none under ``undo``, the others do
            not matter.
        flow: as messages name it.
        before: the fingerprint of the shape of these entries.
        now: that of today's.
        again: what runs the flow from its beginning after this was refused.

    Raises:
        InvalidFlow: it was being undone, so it must never go forward again.
    """
    undoing = entries.get(UNDO)
    if undoing is not None:
        # the names come first: of an item's message only the beginning is kept
        raise InvalidFlow(
            f"{flow} was changed (from {before} to {now}) while it was being undone. Finished or in flight, and "
            f"not undone: {', '.join(_standing(undoing, entries)) or 'nothing'}; undo by hand what must be; {again}. "
            f"It was being undone after: {undoing['error']}"
        )
    log.warning(
        "%s has changed since the last attempt (%s, now %s): it runs from its beginning, with the same idempotency "
        "keys",
        flow,
        before,
        now,
    )


def _standing(undoing: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The steps that are done, or may be, and not undone."""
    finished = [step for step, end in undoing["steps"].items() if end == "completed"]
    # those too behind which a condition failed, and all of a run that was cancelled, whose result names none
    kept = [name for name in entries if name != UNDO and not name.endswith(f".{UNDO}")]
    # with what is known to be undone by nobody, as it was in flight
    steps = dict.fromkeys([*finished, *undoing["undone"], *kept])
    return [step for step in steps if not _is_undone(entries.get(f"{step}.{UNDO}"))]


def _is_undone(entry: Mapping[str, Any] | None) -> bool:
    return entry is not None and entry["error"] is None
