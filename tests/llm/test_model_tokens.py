from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beluga_airflow.llm.model_tokens import TOKEN_BYTES, logprobs, tokens

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


def shown(text: str) -> list[str]:
    return [token.decode(errors="backslashreplace") for token in tokens(text)]


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ('{"answer": "ship_late"}', ['{"', "answe", "r", '":', ' "', "ship", "_late", '"}']),
        ('{"answer":"ship"}', ['{"', "answe", "r", '":"', "ship", '"}']),
        ('"ship", "reason"', ['"ship', '",', ' "', "reaso", "n", '"']),
        ("shipment 12345", ["shipm", "ent", " ", "123", "45"]),
        ("a  late,ship", ["a", " ", " late", ",ship"]),
        (' "😀"', [' "\\xf0\\x9f\\x98', '\\x80"']),
        ("日本", ["日\\xe6\\x9c", "\\xac"]),
        ("\n\n", ["\n\n"]),
        ("", []),
    ],
)
def test_text_is_cut_as_tokenizers_do(text: str, cut: list[str]) -> None:
    assert shown(text) == cut


@given(st.one_of(TEXT, st.text(max_size=20)))
def test_tokens_are_small_and_lose_nothing(text: str) -> None:
    cut = tokens(text)
    assert b"".join(cut) == text.encode(errors="surrogatepass")
    assert all(0 < len(token) <= TOKEN_BYTES for token in cut)


def content(choice: str) -> str:
    return json.dumps({"answer": choice, "reason": "why"}, ensure_ascii=False)


@st.composite
def weighed(draw: st.DrawFn) -> dict[str, float]:
    """Choices, many of them with common beginnings, and how probable each is."""
    stem = draw(TEXT)
    ends = st.one_of(TEXT, st.integers(0, len(stem)).map(lambda at: stem[:at]), TEXT.map(lambda end: stem + end))
    choices = draw(st.lists(ends, min_size=1, max_size=8, unique=True))
    weights = [draw(st.floats(1e-6, 1)) for _ in choices]
    return {choice: weight / math.fsum(weights) for choice, weight in zip(choices, weights, strict=True)}


@given(weighed())
def test_the_tokens_of_each_choice_are_as_probable_as_it_is(choices: dict[str, float]) -> None:
    probabilities = {content(choice): probability for choice, probability in choices.items()}
    assert math.fsum(probabilities.values()) == pytest.approx(1, abs=1e-9)
    for text, probability in probabilities.items():
        told = logprobs(text, probabilities, most=20)
        assert b"".join(bytes(token["bytes"]) for token in told) == text.encode()
        assert math.exp(math.fsum(token["logprob"] for token in told)) == pytest.approx(probability, abs=1e-9)
        for token in told:
            top = token["top_logprobs"]
            assert math.fsum(math.exp(each["logprob"]) for each in top) == pytest.approx(1, abs=1e-9)
            assert [each["logprob"] for each in top] == sorted((each["logprob"] for each in top), reverse=True)
            assert {"token": token["token"], "logprob": token["logprob"], "bytes": token["bytes"]} in top
            assert len({bytes(each["bytes"]) for each in top}) == len(top)


def recovered(told: list[list[dict[str, Any]]]) -> dict[bytes, float]:
    """What a client reads out of the answers: how probable each of them was."""
    return {
        b"".join(bytes(token["bytes"]) for token in answer): math.exp(math.fsum(token["logprob"] for token in answer))
        for answer in told
    }


@given(weighed(), st.integers(0, 3))
def test_reporting_few_alternatives_changes_none_of_those(choices: dict[str, float], most: int) -> None:
    probabilities = {content(choice): probability for choice, probability in choices.items()}
    for text in probabilities:
        whole, few = logprobs(text, probabilities, most=20), logprobs(text, probabilities, most=most)
        assert few == [{**token, "top_logprobs": token["top_logprobs"][:most]} for token in whole]
    every = recovered([logprobs(text, probabilities, most=0) for text in probabilities])
    assert every == pytest.approx({text.encode(): p for text, p in probabilities.items()}, abs=1e-9)


def test_choices_that_share_a_beginning_branch_inside() -> None:
    probabilities = {content("ship"): 0.5, content("ship_late"): 0.3, content("shipment"): 0.15, content("hold"): 0.05}
    told = logprobs(content("ship_late"), probabilities, most=5)
    branches = [
        {each["token"]: round(math.exp(each["logprob"]), 12) for each in token["top_logprobs"]}
        for token in told
        if len(token["top_logprobs"]) > 1
    ]
    assert branches == [{"ship": 0.8, "shipm": 0.15, "hold": 0.05}, {'",': 0.625, "_late": 0.375}]


def test_what_was_impossible_is_not_reported() -> None:
    told = logprobs("a b", {"a b": 1.0, "a c": 0.0}, most=5)
    assert [len(token["top_logprobs"]) for token in told] == [1, 1]
    assert [token["logprob"] for token in told] == [0.0, 0.0]


def test_plain_text_tells_nothing_of_its_end() -> None:
    probabilities = {"ship": 0.6, "ship_late": 0.4}
    (only,) = logprobs("ship", probabilities, most=5)
    assert only["logprob"] == 0.0
    _, second = logprobs("ship_late", probabilities, most=5)
    assert [math.exp(each["logprob"]) for each in second["top_logprobs"]] == pytest.approx([0.4])


def test_bytes_may_be_kept_back() -> None:
    (token,) = logprobs("é", {"é": 1.0}, most=1, with_bytes=False)
    assert token == {
        "token": "é",
        "logprob": 0.0,
        "bytes": None,
        "top_logprobs": [{"token": "é", "logprob": 0.0, "bytes": None}],
    }
