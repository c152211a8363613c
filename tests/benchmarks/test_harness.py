from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import pytest
from harness import Answer, Comparison, Spread, Unequal, compared, spread, text, write

COMPARISON = Comparison(
    work="six steps",
    samples={"beluga": [20.0, 10.0, 30.0], "langgraph": [200.0, 200.0, 100.0], "taskgroup": [4.0, 5.0, 5.0]},
    at_most={"langgraph": 0.1, "taskgroup": 4},
)
ANSWER = Answer(
    question="What does it cost?",
    unit="microseconds",
    comparisons=[
        COMPARISON,
        Comparison(work="one side less", samples={"beluga": [1234.5], "langgraph": [0.5]}, limit=50),
    ],
    versions={"langgraph": "1.0"},
    notes=["A note."],
)
TABLE = """\
### What does it cost?

|  | beluga | langgraph | taskgroup | beluga / langgraph | beluga / taskgroup |
| --- | --- | --- | --- | --- | --- |
| six steps | 20 (10 to 30) | 200 (100 to 200) | 5 (4 to 5) | 0.1 (0.05 to 0.3); target 0.1: met \
| 5 (2 to 6); target 4: missed |
| one side less | 1,234 (1,234 to 1,234); target 50: missed | 0.5 (0.5 to 0.5) |  | 2,469 (2,469 to 2,469) |  |

Median (least to greatest), in microseconds.
A note."""
PAGE = f"# Title\n\n{harness.BEGIN}\n\nold figures\n\n{harness.END}\n\nThe end.\n"


class FakeSide:
    """A side whose every answer is known."""

    def __init__(self, name: str, *, data: Any = "end", ran: int = 1, costs: list[float]) -> None:
        self.name, self.data, self.ran, self.costs = name, data, ran, costs
        self.asked: list[int] = []

    def ask(self, work: Mapping[str, Any], runs: int) -> dict[str, Any]:
        assert work == {"shape": "order"}
        self.asked.append(runs)
        return {"data": self.data, "ran": {"a": self.ran * runs, "b": runs}, "cost": self.costs.pop(0)}


@pytest.mark.parametrize(
    ("samples", "median"), [([3.0], 3.0), ([5.0, 1.0, 2.0], 2.0), ([4.0, 1.0, 2.0, 9.0], 3.0), ([1.0, 100.0], 50.5)]
)
def test_a_spread_is_the_median_the_least_and_the_greatest(samples: list[float], median: float) -> None:
    assert spread(samples) == Spread(median=median, low=min(samples), high=max(samples))


def test_a_ratio_is_taken_in_each_round() -> None:
    # in rounds: 0.1, 0.05, 0.3
    assert COMPARISON.ratios()["langgraph"] == Spread(median=0.1, low=0.05, high=0.3)
    assert COMPARISON.ratios()["taskgroup"] == Spread(median=5, low=2, high=6)
    assert COMPARISON.ratios().keys() == {"langgraph", "taskgroup"}


def test_rounds_must_be_of_the_same_number() -> None:
    with pytest.raises(ValueError, match="shorter"):
        Comparison(work="w", samples={"beluga": [1.0, 2.0], "langgraph": [1.0]}).ratios()


@pytest.mark.parametrize(
    ("number", "written"), [(0.08349, "0.0835"), (6.0, "6"), (19.23, "19.2"), (99.96, "100"), (123_456.7, "123,457")]
)
def test_numbers_have_three_digits_that_matter_and_no_exponent(number: float, written: str) -> None:
    assert str(Spread(median=number, low=number, high=number)) == f"{written} ({written} to {written})"


def test_the_table_has_costs_ratios_and_targets() -> None:
    assert text(ANSWER) == TABLE


def test_sides_take_turns_and_the_first_turns_are_not_counted() -> None:
    ours = FakeSide("beluga", costs=[9.0, 9.0, 9.0, 1.0, 2.0])  # it is asked first what there is to end with
    theirs = FakeSide("langgraph", costs=[8.0, 8.0, 3.0, 4.0])

    samples = compared([ours, theirs], {"shape": "order"}, runs=50, rounds=2)

    assert samples == {"beluga": [1.0, 2.0], "langgraph": [3.0, 4.0]}
    assert ours.asked == [1, 1, 5, 50, 50]
    assert theirs.asked == [1, 5, 50, 50]


@pytest.mark.parametrize(
    ("wrong", "message"), [({"data": "other"}, "langgraph ends with other"), ({"ran": 2}, "not every step ran once")]
)
def test_other_work_is_refused_before_anything_is_timed(wrong: dict[str, Any], message: str) -> None:
    ours = FakeSide("beluga", costs=[1.0] * 9)
    theirs = FakeSide("langgraph", costs=[1.0] * 9, **wrong)

    with pytest.raises(Unequal, match=message):
        compared([ours, theirs], {"shape": "order"}, runs=50, rounds=2)

    assert {*ours.asked, *theirs.asked} == {1}


def test_a_step_of_ours_that_runs_twice_is_refused() -> None:
    with pytest.raises(Unequal, match="with beluga"):
        compared([FakeSide("beluga", ran=2, costs=[1.0] * 9)], {"shape": "order"}, runs=1, rounds=1)


def test_a_side_that_dies_is_named() -> None:
    with pytest.raises(RuntimeError, match="side 'nobody' ended with exit code 2"):
        harness.Side("nobody", "python3")


def test_the_page_keeps_what_is_around_the_figures(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(PAGE)

    write({"cost": ANSWER}, results, page)
    once = page.read_text()
    write({"cost": ANSWER}, results, page)

    assert page.read_text() == once
    assert once.startswith(f"# Title\n\n{harness.BEGIN}\n\nCommit ")
    assert once.endswith(f"A note.\n\n{harness.END}\n\nThe end.\n")
    assert TABLE in once
    assert "langgraph 1.0" in once
    assert "old figures" not in once


def test_the_results_have_every_sample_and_where_they_come_from(tmp_path: Path) -> None:
    page, results = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text(PAGE)

    write({"cost": ANSWER}, results, page)

    found = json.loads(results.read_text())
    assert found["machine"].keys() == {"cores", "cpu", "python"}
    assert found["machine"]["cores"] >= 1
    assert len(found["commit"].removesuffix(" with changes")) == 12
    question = found["questions"]["cost"]
    assert (question["unit"], question["versions"], question["notes"]) == (
        "microseconds",
        {"langgraph": "1.0"},
        ["A note."],
    )
    six = question["comparisons"][0]
    assert six["costs"]["beluga"] == {"median": 20.0, "low": 10.0, "high": 30.0, "samples": [20.0, 10.0, 30.0]}
    assert six["ratios"]["taskgroup"] == {"median": 5.0, "low": 2.0, "high": 6.0}
    assert six["at_most"] == {"langgraph": 0.1, "taskgroup": 4}
    assert question["comparisons"][1]["limit"] == 50
