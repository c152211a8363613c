"""The examples of data and order: see flows.py."""

from __future__ import annotations

from datetime import date
from decimal import Decimal

from tests.conformance.expected import ONE_AT_A_TIME, example, failed

__all__ = ["EXAMPLES"]

LINES = [{"sku": "a", "price": "1.50", "due": "2026-01-31"}]
NOT_JSON = "which is not JSON; return dicts, lists, texts, numbers, dates, decimals, dataclasses or pydantic models"
REFUSED = "what is not JSON is refused at its step"
CONFLICT = (
    "steps 'one' and 'other' of flow '{}' run side by side and set 'total' to different values; let one of them set "
    "another key, or give the flow reducers={{'total': ...}}"
)
ODD = {
    "zero": "\x00",
    "quotes": "'\"%}",
    "otter": "naïve 🦦",
    "tiny": 5e-324,
    "": [{}, [], None, True],
}

EXAMPLES = (
    example(
        "flows:copies",
        "a step has a deep copy of its own",
        inputs={"order_id": "o-1", "lines": LINES},
        data={
            "order_id": "o-1",
            "lines": LINES,
            "tags": ["kept by its step"],
            "looked": [LINES, ["kept by its step"], "o-1", False],
        },
        order=(("give", "meddle"), ("give", "tags"), ("meddle", "look"), ("tags", "look")),
    ),
    example(
        "flows:late",
        "a late step cannot change data",
        inputs={"lines": LINES},
        data={"lines": LINES, "lines_seen": 1, "looked": LINES},
        attempts={"late": 2},
    ),
    example(
        "flows:types",
        "between steps everything is JSON",
        "annotations bring types back",
        inputs={"ordered": date(2026, 1, 1), "discount": Decimal("0.25"), "lines": LINES},
        data={
            "ordered": "2026-01-01",
            "discount": "0.25",
            "lines": LINES,
            "total": "1.25",
            "first": LINES[0],
            "bill": {"ordered": "2026-01-01", "discount": "0.25", "lines": LINES},
            "kinds": ["Decimal", "Line", "date", "date"],
            "triple": "3.75",
            "next": "2026-02-01",
            "pair": [1, None],
        },
    ),
    example(
        "flows:keys_in_order",
        "between steps everything is JSON",
        inputs={"given": {"home": 1, "beach": 2, "alps": 3}},
        data={
            "given": {"home": 1, "beach": 2, "alps": 3},
            "stops": {"zoo": 1, "apple": 2, "museum": 3},
            "route": ["zoo", "apple", "museum"],
            "trip": ["home", "beach", "alps"],
        },
    ),
    failed(
        "flows:refused_by_annotation",
        "step 'price' failed: InvalidInput: step 'price' got data that its annotation refuses: discount: Field "
        "required; lines.0.price: Input should be a valid decimal",
        "annotations bring types back",
        "what is never retried",
        inputs={"ordered": "2026-01-01", "lines": [{**LINES[0], "price": "much"}]},
        never={"price"},
    ),
    failed(
        "flows:unknown_annotation",
        "step 'puzzle' failed: InvalidFlow: the annotation 'Nowhere' of puzzle cannot be resolved: NameError: name "
        "'Nowhere' is not defined; import its type at module level, outside `if TYPE_CHECKING`",
        "annotations bring types back",
        "what is never retried",
        never={"puzzle"},
    ),
    failed(
        "flows:not_json",
        f"step 'give' failed: InvalidOutput: what step 'give' returned['when']['at'][0] is a object, {NOT_JSON}",
        REFUSED,
        "what is never retried",
        never={"end"},
    ),
    failed(
        "flows:number_keys",
        "step 'give' failed: InvalidOutput: what step 'give' returned['stock'] has the key 1, a int; keys must be "
        "texts",
        REFUSED,
    ),
    failed(
        "flows:endless",
        f"step 'give' failed: InvalidOutput: what step 'give' returned['list']{'[0]' * 100} is nested deeper than 100 "
        "levels",
        REFUSED,
    ),
    example(
        "flows:odd_values", "between steps everything is JSON", inputs={"odd": ODD}, data={"odd": ODD, "again": ODD}
    ),
    failed(
        "flows:half_character",
        "step 'give' failed: InvalidOutput: what step 'give' returned['half'] has half a character in it (a lone "
        "surrogate), which is no text",
        REFUSED,
    ),
    failed(
        "flows:big_number",
        "step 'give' failed: InvalidOutput: what step 'give' returned['big'] is a whole number of more than 64 bits; "
        "return it as a text",
        REFUSED,
    ),
    failed(
        "flows:not_finite",
        "step 'give' failed: InvalidOutput: what step 'give' returned['rate'] is nan, which JSON cannot hold; return a "
        "finite number or None",
        REFUSED,
    ),
    failed(
        "flows:no_mapping",
        "step 'give' failed: InvalidOutput: step 'give' returned a list; return a mapping of what the step adds or "
        "changes, or None",
        REFUSED,
    ),
    example(
        "flows:merged",
        "merging goes in topological order, ties by definition",
        "reducers settle a conflict",
        "one finish point returns the merged state",
        inputs={"word": "input", "tags": ["input"]},
        data={
            "word": "late",
            "kept": "early",
            "same": 1,
            "tags": ["late", "other", "third"],
            "tags_seen": ["late", "other", "third"],
        },
        order=(("early", "late"), ("late", "end"), ("other", "end"), ("third", "end")),
    ),
    example(
        "flows:finished_last",
        "merging goes in topological order, ties by definition",
        data={"tags": ["one", "other"]},
        order=(("other", "end"),),
        cannot_show=ONE_AT_A_TIME,
    ),
    failed(
        "flows:conflict",
        f"step 'end' failed: MergeConflict: {CONFLICT.format('conflict')}",
        "different values of parallel branches are a conflict",
        "what is never retried",
        never={"end"},
    ),
    failed(
        "flows:conflict_at_skipped_end",
        f"step 'end' failed: MergeConflict: {CONFLICT.format('conflict-at-skipped-end')}",
        "different values of parallel branches are a conflict",
        "a finish point may be skipped",
        never={"end"},
    ),
    failed(
        "flows:reducer_fails",
        "step 'end' failed: ZeroDivisionError: division by zero",
        "reducers settle a conflict",
        never={"end"},
    ),
    failed(
        "flows:reducer_not_json",
        f"step 'end' failed: InvalidOutput: what the reducer of 'total' returned is a set, {NOT_JSON}",
        "reducers settle a conflict",
        REFUSED,
        never={"end"},
    ),
    example(
        "flows:overlaid",
        "merging goes in topological order, ties by definition",
        inputs={"word": "input"},
        data={"word": "left", "other": "right", "both": ["left", "right"]},
    ),
    example(
        "flows:reducer_of_one",
        "reducers settle a conflict",
        inputs={"total": 9},
        data={"total": 2, "one": False},
        skipped={"one"},
        never={"one"},
    ),
    failed(
        "flows:missing",
        "step 'read' failed: MissingKey: step 'read' reads 'nowhere', which neither the input nor an earlier step "
        "provided; there is: order_id, trace",
        "a missing key names step and key",
        "what is never retried",
        inputs={"order_id": "o-1"},
    ),
    example(
        "flows:when",
        "when by mapping",
        "when by predicate",
        "a step runs when all its incoming edges are taken",
        as_="when-large",
        inputs={"size": 12},
        data={"size": 12, "color": "red", "red": True, "large": True},
        skipped={"small_red"},
        never={"small_red"},
        order=(("look", "red"), ("look", "large"), ("red", "end"), ("large", "end")),
    ),
    example(
        "flows:when",
        "when by mapping",
        "when by predicate",
        as_="when-small",
        inputs={"size": 1},
        data={"size": 1, "color": "red", "red": True, "small_red": True},
        skipped={"large"},
        never={"large"},
    ),
    failed(
        "flows:when_missing",
        "step 'look' failed: the step is done, but its condition on 'look' -> 'end' raised MissingKey: step 'look' "
        "reads 'color', which neither the input nor an earlier step provided; there is: size",
        "when by predicate",
        "a missing key names step and key",
        never={"end"},
    ),
    failed(
        "flows:when_raises",
        "step 'look' failed: the step is done, but its condition on 'look' -> 'end' raised ZeroDivisionError: division "
        "by zero",
        "when by predicate",
        never={"end"},
    ),
    example(
        "flows:when_nothing",
        "when by mapping",
        data={
            name: {"discount": None, "address": {"country": "FR", "lines": [1]}, name: True}
            for name in ("none", "deep", "always")
        },
        skipped={"absent"},
        never={"absent"},
    ),
    example(
        "flows:paid",
        "join any",
        as_="paid-by-one",
        inputs={"card": True, "cash": False},
        data={
            "thank": {"card": True, "cash": False, "card_ok": True, "cash_ok": False, "receipt": True, "thanked": True}
        },
        skipped={"both"},
        never={"both"},
        order=(("by_card", "receipt"), ("by_cash", "receipt"), ("receipt", "thank")),
    ),
    example(
        "flows:paid",
        "join any",
        "a step runs when all its incoming edges are taken",
        "several finish points return the state of each",
        as_="paid-by-both",
        inputs={"card": True, "cash": True},
        data={
            "both": {"card": True, "cash": True, "card_ok": True, "cash_ok": True, "both": True},
            "thank": {"card": True, "cash": True, "card_ok": True, "cash_ok": True, "receipt": True, "thanked": True},
        },
    ),
    example(
        "flows:paid",
        "join any",
        "skips go on",
        "a finish point may be skipped",
        as_="not-paid",
        inputs={"card": False, "cash": False},
        data={},
        skipped={"receipt", "both", "thank"},
        never={"receipt", "both", "thank"},
    ),
    example(
        "flows:skips",
        "skips go on",
        "join any",
        data={"post": {"gift": False, "letter": "dear", "posted": True}},
        skipped={"wrap", "ribbon", "hand_over"},
        never={"wrap", "ribbon", "hand_over"},
    ),
    example(
        "flows:skipped_end",
        "a finish point may be skipped",
        "one finish point returns the merged state",
        inputs={"order_id": "o-1"},
        data={"order_id": "o-1", "total": 3, "credit_ok": False},
        skipped={"end"},
        never={"end"},
    ),
    example(
        "flows:finishes",
        "several finish points return the state of each",
        "a finish point may be skipped",
        inputs={"order_id": "o-1"},
        data={
            "ship": {"order_id": "o-1", "a": 1, "parcel": 1},
            "bill": {"order_id": "o-1", "a": 1, "invoice": 2},
        },
        skipped={"gift"},
        never={"gift"},
    ),
    example(
        "flows:all_finishes_skipped",
        "a finish point may be skipped",
        data={},
        skipped={"ship", "bill"},
        never={"ship", "bill"},
    ),
    example(
        "flows:stop",
        "a stop ends the flow early and successfully",
        status="out_of_stock",
        inputs={"product": "p-1"},
        data={"product": "p-1", "reserved": False},
        skipped={"charge"},
        never={"charge"},
    ),
    example(
        "flows:stop_with_nothing",
        "the status of a stop is a word of the author's",
        status="out of stock",
        inputs={"order_id": "o-1"},
        data={"order_id": "o-1"},
    ),
    failed(
        "flows:stop_not_json",
        f"step 'stock' failed: InvalidOutput: what step 'stock' returned['x'] is a set, {NOT_JSON}",
        REFUSED,
    ),
    example(
        "flows:stops_early",
        "running siblings finish, nothing new starts",
        status="out_of_stock",
        inputs={"order_id": "o-1"},
        data={"order_id": "o-1", "product": "p-1"},
        skipped={"after_first"},
        never={"queued", "after_first", "after_beside"},
        cannot_show=ONE_AT_A_TIME,
    ),
    failed(
        "flows:fails_early",
        "step 'first' failed: RuntimeError: no courier",
        "running siblings finish, nothing new starts",
        never={"queued", "after_first", "after_beside"},
        cannot_show=ONE_AT_A_TIME,
    ),
    failed(
        "flows:two_fail",
        "step 'ship' failed: RuntimeError: no courier",
        "running siblings finish, nothing new starts",
        peak=2,
        cannot_show=ONE_AT_A_TIME,
    ),
    example(
        "flows:two_stop",
        "running siblings finish, nothing new starts",
        status="no_courier",
        peak=2,
        cannot_show=ONE_AT_A_TIME,
    ),
    failed(
        "flows:stop_and_failure",
        "step 'pay' failed: ValueError: no money",
        "running siblings finish, nothing new starts",
        peak=2,
        cannot_show=ONE_AT_A_TIME,
    ),
    example("flows:wide", "independent steps run at once", peak=6, cannot_show=ONE_AT_A_TIME),
    example(
        "flows:blocking",
        "independent steps run at once",
        "a sync step blocks nobody",
        peak=4,
        cannot_show=ONE_AT_A_TIME,
    ),
    example("flows:capped", "max_workers is a cap", "independent steps run at once", peak=2, cannot_show=ONE_AT_A_TIME),
    example(
        "flows:in_turn",
        "not parallel: in topological order",
        data={"b": {"b": 1}, "c": {"a": 1, "c": 1}, "d": {"d": 1}},
        order=(("b", "a"), ("a", "c"), ("c", "d")),
        peak=1,
    ),
    failed(
        "flows:broken_in_turn",
        "step 'two' failed: RuntimeError: no courier",
        "not parallel: in topological order",
        "running siblings finish, nothing new starts",
        never={"three"},
    ),
    *(
        failed(
            f"flows:{name}",
            f"step 'stock' failed: InvalidOutput: step 'stock' returned Stop({given}); the status must be a word that "
            "is none of cancelled, completed, failed, timed_out",
            "the status of a stop is a word of the author's",
            "what is never retried",
        )
        for name, given in (("stop_reserved", "'failed'"), ("stop_no_word", "7"))
    ),
)
