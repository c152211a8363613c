"""Merging what steps returned, the same whoever finished first."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from beluga_airflow.errors import MergeConflict
from beluga_airflow.execute.values import copied, to_json
from beluga_airflow.graph import Flow
from beluga_airflow.graph.shape import Place

__all__ = ["merged"]


def merged(
    flow: Flow, place: Place, inputs: Mapping[str, Any], outputs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """A copy of the flow's input with what a step and the steps before it returned merged into it.

    A later step's value replaces that of the steps before it; values of steps side by side must be equal or have
    a reducer.

    Args:
        flow: whose reducers are used.
        place: of the step.
        inputs: the flow's input.
        outputs: what each finished step returned; steps without one (skipped, or not yet run) are passed over.

    Raises:
        MergeConflict: two steps side by side set a key to different values.
    """
    setters: dict[str, list[str]] = {}
    for step, before in place.ancestors.items():
        for key in outputs.get(step, ()):
            setters[key] = [*(name for name in setters.get(key, ()) if name not in before), step]
    data = {key: copied(value) for key, value in inputs.items()}
    for key, names in setters.items():
        data[key] = copied(outputs[names[0]][key]) if len(names) == 1 else _united(flow, key, names, outputs)
    return data


def _united(flow: Flow, key: str, names: list[str], outputs: Mapping[str, Mapping[str, Any]]) -> Any:
    values = [copied(outputs[name][key]) for name in names]
    reducer = flow.reducers.get(key)
    if reducer is not None:
        return to_json(reduce(reducer, values), f"what the reducer of {key!r} returned")
    for name, value in zip(names, values, strict=True):
        if value != values[0]:
            raise MergeConflict(
                f"steps {names[0]!r} and {name!r} of flow {flow.name!r} run side by side and set {key!r} to different "
                f"values; let one of them set another key, or give the flow reducers={{{key!r}: ...}}"
            )
    return values[0]
