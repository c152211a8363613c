"""Does a step cost more in a longer flow? Chains of 10 to 1,000 no-op async steps."""

from __future__ import annotations

from harness import Answer, Comparison, compared, sides, text

__all__ = ["measured"]

LENGTHS = (10, 30, 100, 300, 1_000)
STEPS = 2_000
ROUNDS = 5


def measured(lengths: tuple[int, ...] = LENGTHS, steps: int = STEPS, rounds: int = ROUNDS) -> Answer:
    """Each turn of each side is as many runs as make about ``steps`` steps."""
    with sides("beluga", "langgraph", "taskgroup") as running:
        comparisons = [
            Comparison(
                work=f"{length:,} steps",
                samples=compared(
                    running, {"shape": length, "sync": False}, runs=max(1, steps // length), rounds=rounds
                ),
            )
            for length in lengths
        ]
        versions = {side.name: side.version for side in running if side.version}
    return Answer(
        question=f"Is it flat? Chains of {lengths[0]:,} to {lengths[-1]:,} async steps, {rounds} rounds",
        unit="microseconds a step",
        comparisons=comparisons,
        versions=versions,
        notes=[growth(comparisons)],
    )


def growth(comparisons: list[Comparison]) -> str:
    """What the longest chain's step costs, as a multiple of the shortest's."""
    shortest, longest = comparisons[0].costs(), comparisons[-1].costs()
    factors = [f"{side} {longest[side].median / shortest[side].median:.2f}" for side in shortest]
    return (
        f"The cost of a step at {comparisons[-1].work}, as a multiple of that at {comparisons[0].work}: "
        f"{', '.join(factors)}. Flat is 1."
    )


if __name__ == "__main__":
    print(text(measured()))
