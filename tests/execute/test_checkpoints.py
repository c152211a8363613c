from __future__ import annotations

from typing import Any

import pytest

from beluga_airflow import FlowResult, InvalidFlow
from beluga_airflow.execute.checkpoints import begin_anew

DONE: dict[str, Any] = {"output": {}, "taken": []}
NAMES = {"flow": "flow 'shop'", "before": "aa", "now": "bb", "again": "a clear runs it anew"}


def undoing(status: str = "failed", error: str = "no truck", **result: Any) -> dict[str, Any]:
    return FlowResult(status=status, error=error, **result).to_json()


def refusal(entries: dict[str, Any]) -> str:
    with pytest.raises(InvalidFlow) as caught:
        begin_anew(entries, **NAMES)
    return str(caught.value)


def test_what_went_forward_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    begin_anew({"pay": DONE}, **NAMES)
    assert caplog.messages == [
        "flow 'shop' has changed since the last attempt (aa, now bb): it runs from its beginning, with the same "
        "idempotency keys"
    ]


def test_what_was_being_undone_is_refused_by_name() -> None:
    steps = {"reserve": "completed", "pay": "completed", "gift": "skipped", "ship": "failed"}
    entries = {"reserve": DONE, "pay": DONE, "undo": undoing(steps=steps), "pay.undo": {"error": None}}
    assert refusal(entries) == (
        "flow 'shop' was changed (from aa to bb) while it was being undone. Finished or in flight, and not undone: "
        "reserve; undo by hand what must be; a clear runs it anew. It was being undone after: no truck"
    )


@pytest.mark.parametrize(
    ("entries", "left"),
    [
        ({"undo": undoing(steps={"pay": "completed"}), "pay.undo": {"error": "the bank is closed"}}, "pay"),
        ({"undo": undoing(steps={"pay": "completed"}), "pay.undo": {"error": None}}, "nothing"),
        # done, and a condition behind it failed
        ({"pay": DONE, "undo": undoing(steps={"pay": "failed"})}, "pay"),
        ({"undo": undoing(steps={"pay": "failed"})}, "nothing"),
        # the result of a run that was cancelled names no steps
        ({"pay": DONE, "undo": undoing("cancelled", "the run was cancelled")}, "pay"),
        # nobody knows what it did
        ({"undo": undoing("timed_out", undone={"pay": "it ran when the flow ended"})}, "pay"),
        # of a nested flow
        ({"in.pay": DONE, "undo": undoing(), "in.pay.undo": {"error": None}}, "nothing"),
    ],
)
def test_what_must_be_looked_at_is_named(entries: dict[str, Any], left: str) -> None:
    assert f"not undone: {left}; undo by hand" in refusal(entries)
