"""The examples of flows in flows: see nested_flows.py."""

from __future__ import annotations

from tests.conformance.expected import KEY, ONE_AT_A_TIME, example, failed

__all__ = ["EXAMPLES"]

NODE, BOUNDS = "a flow is a node of a flow", "a nested flow keeps its own bounds"
WHOLE = "a flow's timeout bounds the whole and names the step"
RETRIED = "a step is retried"
REVERSE = "undone in reverse order"

EXAMPLES = (
    example(
        "nested_flows:nested",
        NODE,
        data={"paid": True, "packed": True, "label of ship.label": f"nested/{KEY}/ship.label"},
        order=(("pay", "ship.pack"), ("ship.pack", "ship.label"), ("ship.label", "notify")),
    ),
    example(
        "nested_flows:nested_at_the_end",
        NODE,
        "several finish points return the state of each",
        data={
            "ship": {"packed": True, "label of ship.label": f"nested-at-the-end/{KEY}/ship.label"},
            "bill": {"bill": 1},
        },
    ),
    example(
        "nested_flows:nested_twice",
        NODE,
        data={
            "packed": True,
            "weight": 3,
            "label of home.label": f"nested-twice/{KEY}/home.label",
            "label of gift.packing.label": f"nested-twice/{KEY}/gift.packing.label",
        },
        order=(("gift.weigh", "gift.packing.pack"), ("gift.packing.label", "end"), ("home.label", "end")),
    ),
    example(
        "nested_flows:nested_when",
        NODE,
        "when by mapping",
        "when by predicate",
        inputs={"product": "p-1"},
        data={
            "bike": {
                "product": "p-1",
                "packed": True,
                "weight": 3,
                "label of ship.packing.label": f"nested-when/{KEY}/ship.packing.label",
                "by": "bike",
            }
        },
        skipped={"van", "truck"},
        never={"van", "truck"},
    ),
    example(
        "nested_flows:nested_skipped_finish",
        NODE,
        "a finish point may be skipped",
        data={"gift": False, "boxed": True, "shipped": True},
        skipped={"prepare.wrap"},
        never={"prepare.wrap"},
        order=(("prepare.box", "ship"),),
    ),
    example(
        "nested_flows:nested_all_finishes_skipped",
        NODE,
        "a finish point may be skipped",
        data={"gift": False},
        skipped={"wrap.wrap"},
        never={"wrap.wrap"},
        order=(("wrap.look", "end"),),
    ),
    example(
        "nested_flows:nested_skipped",
        NODE,
        "skips go on",
        data={"end": {"ship": False, "ended": True}},
        skipped={
            *("ship.weigh", "ship.packing.pack", "ship.packing.label", "ship.packing.result", "ship.result", "after"),
        },
        never={"ship.weigh", "ship.packing.pack", "ship.packing.label", "after"},
    ),
    example(
        "nested_flows:nested_join_any",
        NODE,
        "join any",
        data={
            "card": False,
            "cash": True,
            "packed": True,
            "label of ship.label": f"nested-join-any/{KEY}/ship.label",
        },
    ),
    example(
        "nested_flows:nested_stop",
        NODE,
        "a stop ends the flow early and successfully",
        status="out_of_stock",
        data={"left": 0},
        skipped={"check.end", "check.result", "pay"},
        never={"check.end", "pay"},
    ),
    failed(
        "nested_flows:nested_failure",
        "step 'ship.call' failed: RuntimeError: no courier",
        NODE,
        never={"notify"},
    ),
    failed(
        "nested_flows:nested_retry",
        "step 'ship.call' failed: RuntimeError: no courier",
        BOUNDS,
        RETRIED,
        attempts={"ship.call": 2},
        never={"ship.end"},
    ),
    failed(
        "nested_flows:nested_conflict",
        "step 'sum.result' failed: MergeConflict: steps 'sum.one' and 'sum.other' of flow 'totals' run side "
        "by side and set 'total' to different values; let one of them set another key, or give the flow "
        "reducers={'total': ...}",
        NODE,
        "different values of parallel branches are a conflict",
        never={"end"},
    ),
    example(
        "nested_flows:nested_reducers",
        NODE,
        "reducers settle a conflict",
        data={"total": 3, "is": 3},
    ),
    example(
        "nested_flows:nested_out_of_time",
        BOUNDS,
        WHOLE,
        status="timed_out",
        error="flow 'lasting' used up its timeout of 0.5 s in step 'ship.slow'",
        never={"end"},
    ),
    example(
        "nested_flows:nested_own_time",
        BOUNDS,
        status="timed_out",
        error="flow 'patient' used up its timeout of 0.5 s in step 'ship.slow'",
    ),
    example("nested_flows:nested_late_clock", BOUNDS, data={"packed": True}),
    example("nested_flows:nested_capped", BOUNDS, "max_workers is a cap", peak=2, cannot_show=ONE_AT_A_TIME),
    example(
        "nested_flows:nested_in_turn",
        BOUNDS,
        "not parallel: in topological order",
        data={"c": 1, "a": 1, "b": 1},
        order=(("ship.c", "ship.a"), ("ship.a", "ship.b"), ("ship.b", "end")),
    ),
    failed(
        "nested_flows:nested_undone",
        "step 'ship' failed: RuntimeError: no courier",
        NODE,
        REVERSE,
        undone=dict.fromkeys(("reserve.result", "reserve.van", "reserve.goods", "pay"), "undone"),
        order=(
            ("reserve.result.undo", "reserve.van.undo"),
            ("reserve.van.undo", "reserve.goods.undo"),
            ("reserve.goods.undo", "pay.undo"),
        ),
    ),
    failed(
        "nested_flows:nested_half_undone",
        "step 'reserve.van' failed: RuntimeError: no courier",
        NODE,
        REVERSE,
        undone={"reserve.goods": "undone", "pay": "undone"},
        order=(("reserve.goods.undo", "pay.undo"),),
    ),
    failed(
        "nested_flows:nested_ends_after_failure",
        "step 'first' failed: RuntimeError: no courier",
        NODE,
        REVERSE,
        "running siblings finish, nothing new starts",
        undone={"ship.result": "undone"},
        never={"after"},
        cannot_show=ONE_AT_A_TIME,
    ),
    *(
        example(
            "nested_flows:nested_decision",
            NODE,
            f"decided by {by}",
            as_=f"nested_{by.replace(' ', '_')}",
            inputs={"says": says},
            data={"says": says, "decide": answer},
            decided={"ask.decide": by.rpartition(" ")[2]},
        )
        for says, by, answer in (("", "a rule", True), (False, "the model", False))
    ),
)
