"""What all our operators share: which run a task is, which flow it has, and how a result becomes a task's end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from airflow.sdk import Context
from airflow.sdk.exceptions import AirflowFailException

from beluga_airflow.errors import BelugaError, InvalidInput, InvalidSetting
from beluga_airflow.graph import Chain, Flow, FlowResult, Graph, Identity
from beluga_airflow.graph.locate import load_flow

__all__ = [
    "checked_flow",
    "ended",
    "failing_for_good",
    "identity_of",
    "is_template",
    "mapping_of",
    "owner_of",
    "parsed_text",
    "push_decisions",
    "run_name",
    "run_parts",
]


def checked_flow(flow: Flow | str, *, kind: type[Flow] = Flow) -> Flow:
    """The flow that an operator was given, by object or import path, checked.

    Raises:
        InvalidFlow: it cannot run.
        FlowNotFound: the import path leads nowhere.
        InvalidSetting: it is something else.
    """
    found = load_flow(flow) if isinstance(flow, str) else flow
    if not isinstance(found, kind):
        wanted = {Chain: "a Chain", Graph: "a Graph"}.get(kind, "a Chain or a Graph")
        raise InvalidSetting(f"flow= is a {type(found).__name__}, it must be {wanted}, or the import path of one")
    found.check()
    return found


def run_parts(context: Context) -> tuple[str, str, str, int]:
    """Dag, run, task and map index: what names this task's run."""
    ti = context["ti"]
    return ti.dag_id, ti.run_id, ti.task_id, -1 if ti.map_index is None else ti.map_index


def mapping_of(inputs: Any) -> dict[str, Any]:
    """The input that an operator was given: a mapping, or its JSON text (``"{{ params | tojson }}"`` renders one).

    Raises:
        InvalidInput: it is neither.
    """
    if isinstance(inputs, str):
        inputs = parsed_text(inputs, "the input")
    if inputs is not None and not isinstance(inputs, Mapping):
        raise InvalidInput(f"the input is a {type(inputs).__name__}; give a mapping or its JSON")
    return dict(inputs or {})


def parsed_text(text: str, what: str) -> Any:
    """JSON that arrives as text, as from a template.

    Raises:
        InvalidInput: it is none.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        # the error tells the place, not the text
        raise InvalidInput(f"{what} is a text that is not JSON ({error}); end the template with '| tojson'") from None


def run_name(context: Context) -> str:
    """The run as one text: in workflow ids, batches and records."""
    return "/".join(map(str, run_parts(context)))


def owner_of(context: Context, task_id: str | None = None) -> dict[str, Any]:
    """Who has a run, in its status: this task, or another of this run and map index."""
    dag_id, run_id, own, index = run_parts(context)
    return {"dag_id": dag_id, "run_id": run_id, "task_id": task_id or own, "map_index": index}


def is_template(value: object) -> bool:
    """Whether Airflow renders this value before the task runs."""
    return not isinstance(value, str) or "{{" in value or "{%" in value


def identity_of(
    context: Context,
    flow: str,
    inputs: Mapping[str, Any],
    *,
    key: Any,
    key_is_field: bool,
    generation: int,
) -> Identity:
    """The identity of a run: by business key where there is one, else by dag, run, task and map index.

    Raises:
        InvalidInput: the business key is empty or missing.
    """
    *task, _ = parts = run_parts(context)
    if key is None:
        return Identity.of(*parts, generation=generation, task=tuple(task))
    if key_is_field:
        if key not in inputs:
            raise InvalidInput(
                f"key={key!r} names no field of the input; there is: {', '.join(sorted(inputs)) or 'nothing'}"
            )
        value = inputs[key]
    else:
        value = key
    # a template renders what is missing as "None"
    if value is None or str(value).strip() in ("", "None"):
        raise InvalidInput(
            f"the business key of flow {flow!r} is empty; it must name the item, for instance an order number"
        )
    return Identity.of(flow, value, generation=generation, run=run_name(context), task=tuple(task))


def push_decisions(context: Context, result: FlowResult) -> None:
    """Push the records of a flow's decisions, by step, however it ended."""
    if result.decisions:
        context["ti"].xcom_push(key="decisions", value=result.decisions)


def ended(result: FlowResult) -> dict[str, Any]:
    """What the task returns.

    Raises:
        AirflowFailException: the flow did not end well; its steps' retries are used up, so the task is not retried.
    """
    if not result.ok:
        raise AirflowFailException(f"flow {result.status}: {result.error}")
    return {"status": result.status, "data": result.data}


def failing_for_good(error: BelugaError) -> BaseException:
    """An error of ours as Airflow wants it: one that no retry can help ends the task at once."""
    return error if error.retryable else AirflowFailException(f"{type(error).__name__}: {error}")
