"""What the questions share: sides that take turns, figures with their spread, and the report."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "Answer",
    "Comparison",
    "Side",
    "Spread",
    "Unequal",
    "compared",
    "sides",
    "spread",
    "taking_turns",
    "text",
    "write",
]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEERS = HERE / ".venv" / "bin" / "python"
RESULTS = HERE / "results.json"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured: make bench writes what follows -->", "<!-- end of what make bench writes -->"
OURS = "beluga"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The median of several samples, and the least and the greatest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{_short(self.median)} ({_short(self.low)} to {_short(self.high)})"


def spread(samples: Sequence[float]) -> Spread:
    """The spread of one sample or more."""
    return Spread(median=statistics.median(samples), low=min(samples), high=max(samples))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The same work, done by every side in turn.

    Args:
        work: what was done.
        samples: what it cost each side, one number a round; ours first.
        at_most: the target, for what we cost as a multiple of a peer.
        limit: the target, for what we cost.
    """

    work: str
    samples: Mapping[str, Sequence[float]]
    at_most: Mapping[str, float] = field(default_factory=dict)
    limit: float | None = None

    def costs(self) -> dict[str, Spread]:
        """The cost of each side."""
        return {side: spread(samples) for side, samples in self.samples.items()}

    def ratios(self) -> dict[str, Spread]:
        """Our cost as a multiple of each peer's in the same round."""
        return {
            side: spread([ours / theirs for ours, theirs in zip(self.samples[OURS], samples, strict=True)])
            for side, samples in self.samples.items()
            if side != OURS
        }


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a question found.

    Args:
        question: one line.
        unit: of the costs.
        comparisons: the lines of its table.
        versions: of the packages that were measured.
        notes: sentences for below the table.
    """

    question: str
    unit: str
    comparisons: Sequence[Comparison]
    versions: Mapping[str, str]
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """This answer as JSON, with every sample."""
        return {
            "question": self.question,
            "unit": self.unit,
            "versions": dict(self.versions),
            "comparisons": [
                {
                    "work": each.work,
                    "costs": {
                        side: {**vars(cost), "samples": list(each.samples[side])} for side, cost in each.costs().items()
                    },
                    "ratios": {side: {**vars(ratio)} for side, ratio in each.ratios().items()},
                    "at_most": dict(each.at_most),
                    "limit": each.limit,
                }
                for each in self.comparisons
            ],
            "notes": list(self.notes),
        }


class Unequal(Exception):
    """Two sides did not do the same work: their costs say nothing."""


class Side:
    """A process that does the work its own way. Use ``sides`` to start some.

    Args:
        name: names its program, ``sides/with_<name>.py``.
        python: the interpreter that has its packages.
    """

    def __init__(self, name: str, python: str | Path) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [str(python), str(HERE / "sides" / f"with_{name}.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LANGSMITH_TRACING": "false"},  # nothing of LangGraph's is sent anywhere
        )
        self.version: str | None = self._read()["version"]

    def ask(self, work: Mapping[str, Any], runs: int) -> dict[str, Any]:
        """Do the work some times; ``sides/work.py`` says what can be asked and what is answered."""
        self._process.stdin.write(json.dumps({**work, "runs": runs}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def end(self) -> None:
        """End its process."""
        self._process.kill()
        self._process.communicate()  # and closes its pipes

    def _read(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self.end()
            raise RuntimeError(f"side {self.name!r} ended with exit code {code}; it says why above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def sides(*names: str) -> Iterator[list[Side]]:
    """Sides that live side by side, so that they can take turns; they end with the block.

    Raises:
        FileNotFoundError: the environment of the peers is not there.
    """
    with ExitStack() as stack:
        found = []
        for name in names:
            if name == "langgraph" and not PEERS.exists():
                raise FileNotFoundError(f"{PEERS} is not there; make bench installs the peers")
            side = Side(name, PEERS if name == "langgraph" else sys.executable)
            stack.callback(side.end)
            found.append(side)
        yield found


def compared(running: Sequence[Side], work: Mapping[str, Any], *, runs: int, rounds: int) -> dict[str, list[float]]:
    """What each side's step costs in microseconds: one number a round, in which every side has its turn.

    Args:
        running: the sides.
        work: as ``sides/work.py`` defines it.
        runs: of the work in one turn.
        rounds: how many turns each side has. Two go before them uncounted: one run, by which the sides are found to
            do the same, and a tenth of the runs.

    Raises:
        Unequal: the sides end with different data, or a step ran not at all or twice.
    """
    expected = running[0].ask(work, 1)
    samples: dict[str, list[float]] = {side.name: [] for side in running}
    for side in running:
        _turn(side, work, 1, expected)
    for turn in range(rounds + 1):
        for side in running:
            cost = _turn(side, work, runs if turn else max(1, runs // 10), expected)
            if turn:
                samples[side.name].append(cost)
    return samples


async def taking_turns(
    works: Mapping[str, Callable[[], Awaitable[object]]], *, runs: int, rounds: int
) -> dict[str, list[float]]:
    """What a run of each work costs in microseconds, in this process: one number a round, in which all have a turn.

    Args:
        works: by the name of the side; each checks what it does.
        runs: of the work in one turn, one after the other.
        rounds: how many turns each has. One goes before them uncounted. Who is first in one round is last in the next.
    """
    samples: dict[str, list[float]] = {side: [] for side in works}
    for turn in range(rounds + 1):
        for side in works if turn % 2 else reversed(works):
            run = works[side]
            start = time.perf_counter()
            for _ in range(runs):
                await run()
            if turn:
                samples[side].append(round((time.perf_counter() - start) * 1e6 / runs, 3))
    return samples


def _turn(side: Side, work: Mapping[str, Any], runs: int, expected: Mapping[str, Any]) -> float:
    """The cost of a turn whose steps ran once a run and that ended with the data expected."""
    answer = side.ask(work, runs)
    if answer["ran"] != dict.fromkeys(expected["ran"], runs):
        raise Unequal(f"{work}: not every step ran once a run with {side.name}, in {runs} runs: {answer['ran']}")
    if answer["data"] != expected["data"]:
        raise Unequal(f"{work}: {side.name} ends with {answer['data']}, and should with {expected['data']}")
    cost: float = answer["cost"]
    return cost


def text(answer: Answer) -> str:
    """A question's table, and its notes, as Markdown."""
    names = list(answer.comparisons[0].samples)
    peers = [name for name in names if name != OURS]
    lines = [
        _row(["", *names, *(f"{OURS} / {peer}" for peer in peers)]),
        _row(["---"] * (1 + len(names) + len(peers))),
        *(_row(_cells(each, names, peers)) for each in answer.comparisons),
    ]
    sentences = [f"Median (least to greatest), in {answer.unit}.", *answer.notes]
    return "\n".join([f"### {answer.question}", "", *lines, "", *sentences])


def _cells(each: Comparison, names: Sequence[str], peers: Sequence[str]) -> list[str]:
    costs, ratios = each.costs(), each.ratios()
    ours = {name: _judged(costs[name], each.limit if name == OURS else None) for name in costs}
    theirs = {peer: _judged(ratios[peer], each.at_most.get(peer)) for peer in ratios}
    return [each.work, *(ours.get(name, "") for name in names), *(theirs.get(peer, "") for peer in peers)]


def _judged(found: Spread, target: float | None) -> str:
    if target is None:
        return str(found)
    return f"{found}; target {_short(target)}: {'met' if found.median <= target else 'missed'}"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _short(number: float) -> str:
    """Three digits that matter, never an exponent."""
    return f"{number:,.0f}" if abs(number) >= 100 else f"{number:.3g}"


def write(answers: Mapping[str, Answer], results: Path = RESULTS, page: Path = PAGE) -> None:
    """Put the answers, by the name of their question's file, into the JSON file and between the page's two marks."""
    where = {"commit": _commit(), "machine": _machine()}
    found = {**where, "questions": {name: answer.to_json() for name, answer in answers.items()}}
    results.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    versions = {name: version for answer in answers.values() for name, version in answer.versions.items()}
    machine = where["machine"]
    about = (
        f"Commit {where['commit']}, Python {machine['python']} on {machine['cores']} cores of {machine['cpu']}; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}."
    )
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    parts = [before + BEGIN, about, *(text(answer) for answer in answers.values()), END + after]
    page.write_text("\n\n".join(parts))


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "beluga_airflow", "benchmarks/*.py")
    return git("rev-parse", "--short=12", "HEAD") + (" with changes" if changed else "")


def _machine() -> dict[str, Any]:
    cpu = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")]
    return {"cores": os.cpu_count(), "cpu": models[0] if models else "unknown", "python": platform.python_version()}
