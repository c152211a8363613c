"""The examples of time, trouble, decisions and undoing: see trouble_flows.py."""

from __future__ import annotations

from beluga_airflow.graph.progress import IN_FLIGHT
from tests.conformance.expected import KEY, ONE_AT_A_TIME, example, failed

__all__ = ["EXAMPLES"]

TIMEOUT = "a step's timeout bounds one attempt"
WHOLE = "a flow's timeout bounds the whole and names the step"
RETRIED = "a step is retried"
NEVER_RETRIED = "what is never retried"
CONTAINED = "sys.exit and cancellation are contained"
BY_MODEL, BY_FALLBACK = "decided by the model", "decided by the fallback"
OUTSIDE = "an answer outside the choices never leaves the decision"
REVERSE, OWN = "undone in reverse order", "undone with a key and retries of its own"
IN_DOUBT = "what was in flight at the end is listed"
LISTED, NOTHING = "what cannot be undone is listed", "nothing is undone after a good end"
BOTH = {"pay": "undone", "reserve": "undone"}
UNDOS = (("pay.undo", "reserve.undo"),)

TROUBLE = (
    failed(
        "trouble_flows:slow",
        "step 'slow' failed: StepTimeout: step 'slow' took longer than its timeout of 0.1 s",
        TIMEOUT,
        RETRIED,
        attempts={"slow": 2},
        never={"end"},
    ),
    failed(
        "trouble_flows:slow_in_thread",
        "step 'slow' failed: StepTimeout: step 'slow' took longer than its timeout of 0.1 s",
        TIMEOUT,
        "a sync step blocks nobody",
    ),
    example(
        "trouble_flows:out_of_time",
        WHOLE,
        status="timed_out",
        error="flow 'out-of-time' used up its timeout of 0.5 s in step 'slow', 'slower'",
        cannot_show=ONE_AT_A_TIME,
    ),
    example(
        "trouble_flows:out_of_time_in_thread",
        WHOLE,
        status="timed_out",
        error="flow 'out-of-time-in-thread' used up its timeout of 0.5 s in step 'slow'",
    ),
    example(
        "trouble_flows:waits_too_long",
        WHOLE,
        status="timed_out",
        error="flow 'waits-too-long' used up its timeout of 0.5 s in step 'charge'",
    ),
    example(
        "trouble_flows:retried",
        RETRIED,
        "the key of a step is the same in every attempt",
        data={"attempts": 3, "key": f"retried/{KEY}/charge"},
        attempts={"charge": 3},
    ),
    failed(
        "trouble_flows:used_up",
        "step 'charge' failed: ConnectionError: the bank is closed",
        RETRIED,
        attempts={"charge": 3},
    ),
    failed("trouble_flows:own_retry", "step 'charge' failed: ConnectionError: closed", RETRIED, attempts={"charge": 2}),
    failed("trouble_flows:listed_class", "step 'print' failed: OutOfPaper: no paper", NEVER_RETRIED),
    failed("trouble_flows:listed_name", "step 'print' failed: OutOfPaper: no paper", NEVER_RETRIED),
    failed(
        "trouble_flows:refused", "step 'check' failed: InvalidInput: order_id is empty", NEVER_RETRIED, never={"end"}
    ),
    example("trouble_flows:retry_after", "retry after", attempts={"ask": 2}, waits={"ask": 0.6}),
    failed("trouble_flows:silent", "step 'fail' failed: RuntimeError", RETRIED),
    failed("trouble_flows:long_error", f"step 'fail' failed: RuntimeError: {'x' * 2_000}… (5000 characters)", RETRIED),
    example(
        "trouble_flows:objects",
        "a step may be an object",
        data={"charged": "charge", "flow": "objects", "generation": 0, "notified": "charge"},
    ),
    failed(
        "trouble_flows:exits",
        "step 'leave' failed: StepExited: step 'leave' called sys.exit(3); raise an error instead",
        CONTAINED,
        NEVER_RETRIED,
        never={"end"},
    ),
    failed(
        "trouble_flows:cancelled_inside",
        "step 'wait' failed: RuntimeError: step 'wait' awaited something that was cancelled; catch that in the step",
        CONTAINED,
    ),
    failed(
        "trouble_flows:halts",
        "step 'halt' failed: StepExited: step 'halt' raised Halt: out of order; raise an Exception instead",
        CONTAINED,
        never={"end"},
    ),
    failed(
        "trouble_flows:exits_async",
        "step 'leave' failed: StepExited: step 'leave' called sys.exit(None); raise an error instead",
        CONTAINED,
    ),
    failed(
        "trouble_flows:interrupted",
        "step 'leave' failed: StepExited: step 'leave' called sys.exit('KeyboardInterrupt()'); raise an error instead",
        CONTAINED,
    ),
    failed(
        "trouble_flows:wordless",
        "step 'fail' failed: Wordless: (its text raised ValueError)",
        RETRIED,
        attempts={"fail": 2},
    ),
    failed("trouble_flows:odd_words", "step 'fail' failed: RuntimeError: zero \x00, naïve 🦦", RETRIED),
    failed("trouble_flows:half_words", "step 'fail' failed: RuntimeError: half \\ud800", RETRIED),
)
DECISIONS = (
    *(
        example(
            "trouble_flows:decided",
            BY_MODEL,
            *rules,
            as_=f"decided-{name}",
            inputs={"says": says},
            data={"says": says, "handling": "expedite"},
            decided={"decide": "model"},
        )
        for name, says, rules in (("at-once", "expedite", ()), ("when-asked-again", "second thoughts", (OUTSIDE,)))
    ),
    *(
        failed(
            "trouble_flows:decided",
            f"step 'decide' failed: {error}",
            rule,
            as_=f"decided-{says}",
            inputs={"says": says},
            never={"end"},
        )
        for says, rule, error in (
            (
                "nonsense",
                OUTSIDE,
                "Undecided: the model came to no answer that fits: the answer is none of the choices expedite, "
                "standard; ask more clearly or give a fallback",
            ),
            ("overloaded", RETRIED, "ModelUnavailable: the endpoint is overloaded"),
            ("refused", NEVER_RETRIED, "ModelRefused: the endpoint refuses the key"),
        )
    ),
    *(
        example(
            "trouble_flows:falls_back",
            BY_FALLBACK,
            OUTSIDE,
            as_=f"falls-back-{says}",
            inputs={"says": says},
            data={"says": says, "handling": "standard"},
            decided={"decide": "fallback"},
        )
        for says in ("nonsense", "overloaded")
    ),
    failed(
        "trouble_flows:decided_then_failed",
        "step 'ship' failed: RuntimeError: no courier",
        BY_MODEL,
        inputs={"says": "expedite"},
        decided={"decide": "model"},
    ),
    example(
        "trouble_flows:by_rule",
        "decided by a rule",
        inputs={"says": "nonsense"},
        data={"says": "nonsense", "decide": "standard"},
        decided={"decide": "rule"},
    ),
    failed(
        "trouble_flows:bad_rule",
        "step 'decide' failed: Undecided: a rule or the fallback gave an answer that does not fit: the answer is none "
        "of the choices expedite, standard; mend the decision",
        "decided by a rule",
        OUTSIDE,
        inputs={"says": ""},
    ),
    failed(
        "trouble_flows:number",
        "step 'decide' failed: Undecided: the model came to no answer that fits: the answer is not a whole number of "
        "at most 63 bits; ask more clearly or give a fallback",
        OUTSIDE,
        inputs={"says": 2.5},
    ),
    failed(
        "trouble_flows:no_question",
        "step 'decide' failed: MissingKey: step 'decide' reads 'gone', which neither the input nor an earlier step "
        "provided; there is: trace",
        "a missing key names step and key",
    ),
)
UNDOING = (
    failed(
        "trouble_flows:undone",
        "step 'ship' failed: RuntimeError: no courier",
        REVERSE,
        OWN,
        attempts={"ship": 2},
        undone=BOTH,
        order=UNDOS,
        never={"notify"},
    ),
    example(
        "trouble_flows:undone_in_time",
        REVERSE,
        WHOLE,
        IN_DOUBT,
        status="timed_out",
        error="flow 'undone-in-time' used up its timeout of 5 s in step 'ship'; "
        f"step 'ship' could not be undone: {IN_FLIGHT}",
        undone={"ship": IN_FLIGHT, **BOTH},
        order=UNDOS,
    ),
    failed(
        "trouble_flows:undone_refused",
        "step 'ship' failed: InvalidInput: no such street",
        REVERSE,
        undone=BOTH,
        order=UNDOS,
    ),
    failed(
        "trouble_flows:undo_retried",
        "step 'ship' failed: RuntimeError: no courier",
        OWN,
        attempts={"ship": 2, "pay.undo": 2},
        undone=BOTH,
        order=UNDOS,
    ),
    example(
        "trouble_flows:not_undone_after_stop",
        NOTHING,
        status="no_courier",
        data={"reserved": True, "payment": "p-1"},
        skipped={"notify"},
        never={"pay.undo", "reserve.undo", "ship.undo"},
    ),
    example(
        "trouble_flows:not_undone_after_end",
        NOTHING,
        data={"reserved": True, "payment": "p-1", "parcel": 1},
        never={"pay.undo", "reserve.undo", "ship.undo", "notify.undo"},
    ),
    failed(
        "trouble_flows:undone_by_object",
        "step 'ship' failed: RuntimeError: no courier",
        OWN,
        "annotations bring types back",
        "a step may be an object",
        undone={"pay": "undone"},
    ),
    failed(
        "trouble_flows:undone_beside",
        "step 'first' failed: RuntimeError: no courier",
        REVERSE,
        "running siblings finish, nothing new starts",
        skipped={"skipped"},
        undone={"look": "undone", "beside": "undone"},
        order=(("look.undo", "beside.undo"),),
        never={"first.undo", "skipped.undo"},
        cannot_show=ONE_AT_A_TIME,
    ),
    failed(
        "trouble_flows:condition_fails",
        "step 'pay' failed: the step is done, but its condition on 'pay' -> 'ship' raised MissingKey: step 'pay' reads "
        "'parcel', which neither the input nor an earlier step provided; there is: payment",
        "a step whose condition fails is done, and undone",
        undone={"pay": "undone"},
        never={"ship"},
    ),
    *(
        failed(
            f"trouble_flows:{name}",
            f"step 'ship' failed: RuntimeError: no courier; step 'pay' could not be undone: {why}",
            LISTED,
            OWN,
            attempts={"ship": 2, "pay.undo": times},
            undone={"pay": why, "reserve": "undone"},
        )
        for name, why, times in (
            ("undo_fails", "ConnectionError: the bank is closed", 2),
            ("undo_refused", "InvalidInput: no such payment", 1),
            ("undo_late", "StepTimeout: step 'pay.undo' took longer than its timeout of 0.5 s", 2),
            ("undo_exits", "StepExited: step 'pay.undo' called sys.exit(1); raise an error instead", 1),
        )
    ),
)
EXAMPLES = (*TROUBLE, *DECISIONS, *UNDOING)
