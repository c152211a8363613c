"""What does a step cost? The order graph of six no-op steps, 1,000 times in one process."""

from __future__ import annotations

from harness import Answer, Comparison, compared, sides, text

__all__ = ["measured"]

RUNS = 1_000
ROUNDS = 7


def measured(runs: int = RUNS, rounds: int = ROUNDS) -> Answer:
    """Async steps on all sides, plain ones where a side has a way to keep them off the event loop."""
    with sides("beluga", "langgraph", "taskgroup") as running:
        coroutines = compared(running, {"shape": "order", "sync": False}, runs=runs, rounds=rounds)
        plain = compared(running[:2], {"shape": "order", "sync": True}, runs=runs, rounds=rounds)
        versions = {side.name: side.version for side in running if side.version}
    return Answer(
        question=f"What does a step cost? {runs:,} runs of the order graph, {rounds} rounds",
        unit="microseconds a step",
        comparisons=[
            Comparison(work="async steps", samples=coroutines, at_most={"langgraph": 0.1, "taskgroup": 6}),
            Comparison(work="plain steps, in threads", samples=plain),
        ],
        versions=versions,
    )


if __name__ == "__main__":
    print(text(measured()))
