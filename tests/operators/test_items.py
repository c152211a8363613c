"""What goes into a batch, and what is published of it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from beluga_airflow.errors import InvalidInput, InvalidSetting, StateUnavailable
from beluga_airflow.operators.items import Manifest, items_of, published
from tests.operators import sample_flows as flows
from tests.operators.conftest import lines_of

PATH = "tests.operators.sample_flows"


async def given(items: Any, arguments: Any = None) -> list[Any]:
    return [item async for item in items_of(items, arguments)]


async def later() -> AsyncIterator[int]:
    yield 1


def record(answer: Any = "yes", **changes: Any) -> dict[str, Any]:
    whole = {
        "answer": answer,
        "decided_by": "model",
        "tokens": {"input": 100, "output": 10},
        "cost_usd": 0.25,
        "simulated": False,
    }
    return whole | changes


def result(index: int, status: str = "completed", **decisions: dict[str, Any]) -> dict[str, Any]:
    return {"index": index, "key": f"o-{index}", "status": status, "decisions": decisions}


async def each(*results: dict[str, Any], error: Exception | None = None) -> AsyncIterator[dict[str, Any]]:
    for one in results:
        yield one
    if error is not None:
        raise error


def names_in(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# items


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([1, 2], [1, 2]),
        ((), []),
        ((n for n in "ab"), ["a", "b"]),
        (later(), [1]),
        ('[{"a": 1}, 2]', [{"a": 1}, 2]),
        (" []", []),
    ],
)
async def test_items_as_they_are(items: Any, expected: list[Any]) -> None:
    assert await given(items) == expected


async def test_items_by_the_path_of_a_function(token: str) -> None:
    assert [item["id"] for item in await given(f"{PATH}:orders", {"count": 2, "token": token})] == [0, 1]
    assert flows.seen[token] == ["orders(2)"]
    assert len(await given(f"{PATH}:orders")) == 3
    assert [item["id"] for item in await given(f"{PATH}:orders_by_and_by", {"token": token})] == [0, 1]
    assert await given(f"{__name__}:in_a_while") == [7]


async def in_a_while() -> list[int]:
    return [7]


async def test_items_are_not_held_in_memory() -> None:
    taken: list[int] = []

    def endless() -> Any:
        while True:
            taken.append(len(taken))
            yield taken[-1]

    async for item in items_of(endless(), None):
        if item == 3:
            break
    assert taken == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("items", "arguments", "says"),
    [
        (None, None, "items= gave a NoneType, it must give an iterable of items"),
        ({"a": 1}, None, "items= gave a dict"),
        (7, None, "items= gave a int"),
        (b"ab", None, "items= gave a bytes"),
        (f"{PATH}:a_number", None, "items= gave a int"),
        ("nowhere:orders", None, "items='nowhere:orders' cannot be imported: ModuleNotFoundError"),
        (f"{PATH}:nothing", None, "cannot be imported: AttributeError"),
        (f"{PATH}:not_a_flow", None, "is not the import path of a function; write 'package.module:function'"),
        (PATH, None, "is not the import path of a function"),
        (":orders", None, "is not the import path of a function"),
        (".relative:orders", None, "cannot be imported: TypeError"),
        ("", None, "items='' is not the import path"),
        (f"{PATH}:orders", {"day": "x"}, f"items_args= does not fit items='{PATH}:orders': got an unexpected keyword"),
        ("some text " * 1000, None, "...' is not the import path"),
        ("{'a': 1}" * 1000, None, "cannot be imported"),
    ],
)
async def test_what_gives_no_items_is_refused(items: Any, arguments: Any, says: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        await given(items, arguments)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 400, "somebody's data is not quoted whole"


async def test_a_module_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_items_module.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InvalidSetting, match="items='broken_items_module:f' cannot be imported: ZeroDivisionError"):
        await given("broken_items_module:f")


@pytest.mark.parametrize("items", ["[{'a': 'SECRET'}]", "[" * 100_000])
async def test_a_list_that_python_printed_is_refused(items: str) -> None:
    with pytest.raises(InvalidInput, match="items= is a text that is not JSON") as caught:
        await given(items)
    assert "SECRET" not in str(caught.value)


async def test_the_error_of_the_function_is_its_own(token: str) -> None:
    flows.broken.add(token)
    with pytest.raises(OSError, match="the file ends too early"):
        await given(f"{PATH}:spoiled", {"token": token})


# results


async def test_results_are_lines_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "results.jsonl"
    results = [result(0), {**result(1, "failed"), "error": "naïve\n\u2028\x85 \ud800"}, result(2, "out_of_stock")]
    manifest = await published(each(*results), path)
    assert lines_of(path) == results
    assert len(path.read_text(encoding="ascii").splitlines()) == 3
    assert manifest.statuses == {"completed": 1, "failed": 1, "out_of_stock": 1}
    assert names_in(path.parent) == ["results.jsonl"]


async def test_no_results_are_an_empty_file(tmp_path: Path) -> None:
    manifest = await published(each(), tmp_path / "r.jsonl")
    assert (tmp_path / "r.jsonl").read_bytes() == b""
    assert manifest.to_json() == {
        "total": 0,
        "statuses": {},
        "decisions": {"choices": {}, "decided_by": {}},
        "tokens": {"input": 0, "output": 0},
        "cost_usd": 0.0,
        "simulated": False,
    }


async def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("the last run's\n")
    with pytest.raises(StateUnavailable):
        await published(each(result(0), error=StateUnavailable("the store is gone")), path)
    assert path.read_text() == "the last run's\n"
    assert names_in(tmp_path) == ["r.jsonl"], "nothing half-written is left"

    seen_meanwhile = []

    async def watched() -> AsyncIterator[dict[str, Any]]:
        yield result(0)
        seen_meanwhile.append(path.read_text())
        yield result(1)

    await published(watched(), path)
    assert seen_meanwhile == ["the last run's\n"]
    assert len(lines_of(path)) == 2


@pytest.mark.parametrize("place", ["", "file/results.jsonl"])
async def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / place
    with pytest.raises(InvalidSetting, match=r"cannot be written to .* set results_path= to another place"):
        await published(each(result(0)), path)
    assert names_in(tmp_path) == ["file"]
    assert not [name for name in names_in(tmp_path.parent) if name.startswith(f".{tmp_path.name}")]


def test_the_manifest_sums() -> None:
    manifest = Manifest()
    manifest.add(result(0, a=record("yes"), b=record(True, decided_by="rule", cost_usd=0.0, tokens={"input": 0})))
    manifest.add(result(1, "failed"))
    manifest.add(result(2, "out_of_stock", a=record("yes", simulated=True)))
    manifest.add(result(3, a=record("no", decided_by="fallback"), b=record(False)))
    assert manifest.to_json() == {
        "total": 4,
        "statuses": {"completed": 2, "failed": 1, "out_of_stock": 1},
        "decisions": {
            "choices": {"false": 1, "no": 1, "true": 1, "yes": 2},
            "decided_by": {"fallback": 1, "model": 3, "rule": 1},
        },
        "tokens": {"input": 400, "output": 40},
        "cost_usd": 1.0,
        "simulated": True,
    }
    json.dumps(manifest.to_json(), allow_nan=False)


def test_one_unknown_price_makes_the_sum_unknown() -> None:
    manifest = Manifest()
    manifest.add(result(0, a=record(cost_usd=None), b=record()))
    manifest.add(result(1, a=record()))
    assert manifest.to_json()["cost_usd"] is None


def test_numbers_and_objects_are_no_choices() -> None:
    # a manifest is an XCom: it must not grow with the items
    manifest = Manifest()
    for number in range(100):
        manifest.add(result(number, a=record(number), b=record(number / 7), c=record({"level": number})))
    assert manifest.to_json()["decisions"] == {"choices": {}, "decided_by": {"model": 300}}
