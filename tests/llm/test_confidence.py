"""Confidence: exactly what the endpoint reports of the choices, in whatever tokens it writes them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beluga_airflow import Chain, Decision, run
from beluga_airflow.llm import model_tokens
from beluga_airflow.llm.answers import Misfit, offered_schema, parsed, schema_of
from beluga_airflow.llm.client import Endpoint, ModelReply, OpenAIClient
from beluga_airflow.llm.confidence import Confidence, check_sure, confidence_of, logprobs_for
from beluga_airflow.llm.decide import _fingerprint
from beluga_airflow.llm.logprobs import Token, tokens_of
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.llm.offers import offered
from beluga_airflow.state import open_store
from beluga_airflow.testing import reply
from tests.llm.conftest import ClientFactory
from tests.llm.test_decide import Desk

Cut = Callable[[str], list[bytes]]
SHARING = ("ship", "ship_late", "shipping", "ship late")
WITHIN = 1e-6


def choosing(*choices: str, **options: Any) -> Decision:
    return Decision("Which?", choices=choices, reads=("x",), **options)


def content_of(text: str, *, before: str = '{"answer": ') -> str:
    return f'{before}{json.dumps(text, ensure_ascii=False)}, "reason": "so"}}'


def replied(content: str, *reported: Mapping[str | bytes, float]) -> ModelReply:
    """A reply whose tokens are the first of each, beside whatever else was reported for their place."""
    tokens = []
    for each in reported:
        places = [(text if isinstance(text, bytes) else text.encode(), mass) for text, mass in each.items()]
        tokens.append(Token(places[0][0], tuple(places)))
    return replace(reply(content), tokens=tuple(tokens))


def sure(decision: Decision, answered: ModelReply) -> Confidence | None:
    answer, _ = parsed(decision, answered)
    return confidence_of(decision, answer, answered)


def close(found: Confidence | None, expected: Mapping[str, float], answer: str) -> None:
    assert found is not None
    assert found.probabilities.keys() == expected.keys()
    assert found.probabilities == pytest.approx(expected, abs=WITHIN)
    assert found.value == found.probabilities[answer]


# what is offered


def test_choices_are_offered_behind_signs_in_the_authors_order() -> None:
    decision = choosing("expedite", "ship", "ship_late")
    assert offered(decision) == {"A: expedite": "expedite", "B: ship": "ship", "C: ship_late": "ship_late"}
    assert offered_schema(decision)["properties"]["answer"]["enum"] == list(offered(decision))
    assert schema_of(decision)["properties"]["answer"]["enum"] == ["expedite", "ship", "ship_late"]
    assert offered(Decision("?", output_type=bool, reads=("x",))) == {}


def test_the_fingerprint_knows_nothing_of_signs() -> None:
    decision = Decision("Which queue?", choices={"expedite": "today", "standard": ""}, reads=("tier",))
    # as it was before there were signs: what is on record is still found
    assert _fingerprint(decision, {"tier": "gold"}) == "a4c63161675146c8c4a91aa5037359b1"
    assert _fingerprint(replace(decision, min_confidence=0.5), {"tier": "gold"}) == "a4c63161675146c8c4a91aa5037359b1"


@pytest.mark.parametrize("count", [2, 26, 27, 62, 63, 300, 5000])
def test_however_many_choices_there_are_each_has_a_sign_of_its_own(count: int) -> None:
    decision = choosing(*(f"choice {number}" for number in range(count)))
    signs = [text.partition(": ")[0] for text in offered(decision)]
    assert len(set(signs)) == count
    assert len({len(sign) for sign in signs}) == 1
    assert len(signs[0]) == (1 if count <= 62 else 2 if count <= 3844 else 3)
    assert list(offered(decision).values()) == list(decision.labels)


@pytest.mark.parametrize("choices", [("B", "A"), ("A: x", "x"), ("x", "A: x", "B: x"), ("A:", "C:x", "z"), ("Z", "a")])
def test_what_looks_like_a_sign_is_none(choices: tuple[str, ...]) -> None:
    decision = choosing(*choices)
    texts = offered(decision)
    assert not set(texts) & set(choices)
    assert not {text.partition(": ")[0] for text in texts} & set(choices)
    for written in (*texts.items(), *((choice, choice) for choice in choices)):
        assert parsed(decision, reply(content_of(written[0])))[0] == written[1]
        assert parsed(decision, reply(f"\n {written[0]} "))[0] == written[1]
    with pytest.raises(Misfit):
        parsed(decision, reply(content_of(next(iter(texts))[0])))


# the walk over tokens

EXPEDITE = content_of("A: expedite")
SET = {"expedite": 0.6, "ship": 0.3, "ship_late": 0.1}


@pytest.mark.parametrize(
    "reported",
    [
        pytest.param([{'{"answer": "': 1}, {"A": 0.6, "B": 0.3, "C": 0.1}], id="a token of its own"),
        pytest.param([{'{"answer":': 1}, {' "A': 0.6, ' "B': 0.3, ' "C': 0.1}], id="with quote and space"),
        pytest.param([{'{"answer": ': 1}, {'"A': 0.6, '"B': 0.3, '"C': 0.1}], id="with the quote"),
        pytest.param([{'{"answer': 1}, {'": "A: ex': 0.6, '": "B: sh': 0.3, '": "C: sh': 0.1}], id="with all around"),
        pytest.param([{EXPEDITE: 0.6, content_of("B: ship"): 0.3, content_of("C: ship_late"): 0.1}], id="at once"),
        pytest.param([{'{"answer": "': 1}, {"A": 0.5, " A": 0.1, "B": 0.2, "  B": 0.1, "C": 0.1}], id="with spaces"),
        pytest.param([{'{"answer": "': 1}, {"A": 0.2, "A:": 0.3, "A: e": 0.1, "B": 0.3, "C:": 0.1}], id="some longer"),
        pytest.param(
            [{'{"answer":': 1}, {' "': 0.5, ' "A': 0.2, '"B': 0.2, '\n "C': 0.1}, {"A": 0.8, "B": 0.2}],
            id="some by another way",
        ),
        pytest.param([{'{"answer": "': 0.2, '{ "': 0.7}, {"A": 0.6, "B": 0.3, "C": 0.1}], id="after a rare beginning"),
        pytest.param([{'{"answer": "': 1}, {"A": 0.06, "B": 0.03, "C": 0.01, "D": 0.6, "AB": 0.3}], id="beside others"),
        pytest.param([{'{"answer": "': 1}, {"A": 0.6, "B": 0.3, "C": 0.1, b"\xf0\x9f": 1e-9}], id="half a character"),
    ],
)
def test_the_tokens_that_mean_a_choice_are_its(reported: Sequence[dict[str | bytes, float]]) -> None:
    close(sure(choosing("expedite", "ship", "ship_late"), replied(EXPEDITE, *reported)), SET, "expedite")


def test_what_was_not_reported_is_not_said() -> None:
    decision = choosing("expedite", "ship", "ship_late")
    close(
        sure(decision, replied(EXPEDITE, {'{"answer": "': 1}, {"A": 0.5, "B": 0.3})),
        {"expedite": 0.625, "ship": 0.375},
        "expedite",
    )


@pytest.mark.parametrize("others", [{}, {"D": 0.1}])
def test_with_nothing_to_compare_it_with_it_is_as_probable_as_was_reported(others: dict[str, float]) -> None:
    found = sure(choosing("expedite", "ship"), replied(EXPEDITE, {'{"answer": "': 0.7}, {"A": 0.6, **others}))
    close(found, {"expedite": 0.6 / (1 - sum(others.values()))}, "expedite")


def test_the_answered_may_be_the_least_probable() -> None:
    found = sure(choosing("a", "b"), replied(content_of("B: b"), {'{"answer": "': 1}, {"B": 0.1, "A": 0.9}))
    close(found, {"a": 0.9, "b": 0.1}, "b")


@pytest.mark.parametrize(
    "content",
    [
        '{ \n"answer"\t:\r\n  "B: b" ,"reason":"r"}',
        '{"reason": "[,\\": {", "n": [1, {"answer": 3}], "answer": "B: b"}',
        'So, then:\n\n```json\n{"answer": "B: b"}\n```\n',
        '```\n{"answer": "b"}```',
        "B: b",
        "  b\n",
        '{"answer": "b"}',
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_the_answer_is_found_wherever_it_is(content: str, size: int) -> None:
    data = content.encode()
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    answered = replied(content, *({piece: 0.5, b"\x01": 0.5} for piece in pieces))
    close(sure(choosing("a", "b"), answered), {"b": 1.0}, "b")


def test_bool_is_told_by_its_words() -> None:
    decision = Decision("?", output_type=bool, reads=("x",))
    for content, head in (('{"answer": true}', '{"answer":'), ("true", "")):
        heads: list[Any] = [{head: 1}] if head else []
        found = sure(decision, replied(content, *heads, {" true": 0.6, "false": 0.2, "tr": 0.1, "maybe": 0.1}))
        close(found, {"true": 0.7 / 0.9, "false": 0.2 / 0.9}, "true")


def test_names_that_begin_alike_are_told_apart_where_they_part() -> None:
    decision = choosing("ship", "ship_late", "hold")
    quote: dict[str | bytes, float] = {'{"answer": "': 1}
    found = sure(
        decision, replied('{"answer": "ship_late"}', quote, {"ship": 0.8, "hold": 0.2}, {"_late": 0.25, '"': 0.75})
    )
    close(found, {"ship": 0.6, "ship_late": 0.2, "hold": 0.2}, "ship_late")
    # what may be either is nobody's, and speaks against the answer
    found = sure(decision, replied('{"answer": "hold"}', quote, {"hold": 0.4, "ship": 0.6}))
    close(found, {"hold": 0.4}, "hold")
    found = sure(decision, replied('{"answer": "ship_late"}', quote, {"ship_": 0.4, "ship": 0.5, "hold": 0.1}))
    close(found, {"ship_late": 0.4, "hold": 0.1}, "ship_late")
    # where a bare answer might have ended, what was not reported may have been its end
    found = sure(decision, replied("ship_late", {"ship": 0.8, "hold": 0.2}, {"_late": 0.25, "<end>": 0.7}))
    close(found, {"ship_late": 0.2, "hold": 0.2}, "ship_late")
    assert sure(decision, replied("ship", {"ship": 0.9, "hold": 0.1})) is None


@pytest.mark.parametrize(
    "tokens",
    [
        None,
        (),
        (Token(b"something else", ((b"something else", 1.0),)),),
        (Token(b'{"answer": "', ((b'{"answer": "', 1.0),)),),
        (Token(b'{"answer": "A', ((b'{"answer": "A', 0.0),)),),
    ],
)
def test_what_cannot_be_read_is_not_known(tokens: Any) -> None:
    assert sure(choosing("expedite", "ship"), replace(reply(EXPEDITE), tokens=tokens)) is None


def test_a_choice_in_an_odd_spelling_is_taken_and_its_confidence_is_not_known() -> None:
    content = '{"answer": "\\u0041: expedite"}'
    assert parsed(choosing("expedite", "ship"), reply(content))[0] == "expedite"
    assert sure(choosing("expedite", "ship"), replied(content, {content: 1})) is None


def test_other_answers_have_none() -> None:
    decision = Decision("?", output_type=int, reads=("x",))
    assert sure(decision, replied('{"answer": 7}', {'{"answer": 7}': 1})) is None
    assert logprobs_for(decision) == "no"
    assert logprobs_for(choosing("a", "b")) == "wanted"
    assert logprobs_for(choosing("a", "b", min_confidence=1)) == "needed"


# any choices, any probabilities, any tokens: beside a count of all that might have been


def by(size: int) -> Cut:
    return lambda text: [text.encode()[at : at + size] for at in range(0, len(text.encode()), size)]


def in_words(text: str) -> list[bytes]:
    return model_tokens.tokens(text)


def reported(contents: Mapping[str, float], answered: str, cut: Cut, most: int | None) -> list[Token]:
    """What an endpoint reports that might have written any of the contents."""
    paths = [(cut(text), mass) for text, mass in contents.items()]
    found = []
    for at, token in enumerate(cut(answered)):
        whole = math.fsum(mass for _, mass in paths)
        masses: Counter[bytes] = Counter()
        for path, mass in paths:
            if at < len(path):
                masses[path[at]] += mass / whole  # type: ignore[assignment]  # a Counter counts floats too
        told = dict(masses.most_common(most)) | {token: masses[token]}
        found.append(Token(token, tuple(told.items())))
        paths = [(path, mass) for path, mass in paths if path[at : at + 1] == [token]]
    return found


names = st.lists(
    st.sampled_from(
        [*SHARING, "expedite", "é\N{PACKAGE}", "é\N{PACKAGE}\N{PACKAGE}", 'a"b', "a\\b", "A", "A: ship", "C"]
    )
    | st.text(st.characters(codec="utf-8"), min_size=1, max_size=8).filter(str.strip),
    min_size=2,
    max_size=30,
    unique=True,
)


@st.composite
def shares(draw: st.DrawFn) -> tuple[tuple[str, ...], list[float]]:
    choices = tuple(draw(names))
    weights = draw(st.lists(st.integers(1, 1000), min_size=len(choices), max_size=len(choices), unique=True))
    return choices, [weight / sum(weights) for weight in weights]


@given(shares(), st.data(), st.sampled_from([in_words, *map(by, range(1, 8))]), st.integers(1, 20) | st.none())
def test_it_is_what_the_endpoint_set(
    given: tuple[tuple[str, ...], list[float]], data: st.DataObject, cut: Cut, most: int | None
) -> None:
    choices, probabilities = given
    decision = choosing(*choices)
    of = dict(zip(choices, probabilities, strict=True))
    contents = {content_of(text): of[choice] for text, choice in offered(decision).items()}
    text, answer = data.draw(st.sampled_from(list(offered(decision).items())))
    tokens = reported(contents, content_of(text), cut, most)
    found = sure(decision, replace(reply(content_of(text)), tokens=tuple(tokens)))
    ranked = sorted(choices, key=lambda choice: -of[choice])[:most]
    seen = {choice: of[choice] for choice in of if choice in ranked or choice == answer}
    whole = sum(seen.values()) if len(seen) > 1 else 1.0
    close(found, {choice: mass / whole for choice, mass in seen.items()}, answer)


@settings(max_examples=20)
@given(st.lists(st.integers(1, 100), min_size=70, max_size=70, unique=True), st.integers(0, 69))
def test_signs_of_two_characters_in_tokens_of_one(weights: list[int], chosen: int) -> None:
    decision = choosing(*(f"c{number}" for number in range(70)))
    of = {f"c{number}": weight / sum(weights) for number, weight in enumerate(weights)}
    contents = {content_of(text): of[choice] for text, choice in offered(decision).items()}
    text, answer = list(offered(decision).items())[chosen]
    found = sure(
        decision, replace(reply(content_of(text)), tokens=tuple(reported(contents, content_of(text), by(1), None)))
    )
    assert found is not None
    # of those that begin with another character nothing but their sum is known
    alike = {choice: of[choice] for other, choice in offered(decision).items() if other[0] == text[0]}
    assert found.probabilities == pytest.approx(alike, abs=WITHIN)
    assert found.value == pytest.approx(of[answer], abs=WITHIN)


# what endpoints report


def test_what_the_server_reports_is_read() -> None:
    contents = {content_of("A: a"): 0.75, content_of("B: b"): 0.25}
    for with_bytes in (True, False):
        told = model_tokens.logprobs(content_of("A: a"), contents, most=5, with_bytes=with_bytes)
        tokens = tokens_of({"content": told})
        assert tokens is not None
        assert b"".join(token.text for token in tokens) == content_of("A: a").encode()
        close(sure(choosing("a", "b"), replace(reply(content_of("A: a")), tokens=tokens)), {"a": 0.75, "b": 0.25}, "a")


def told(word: Any = "A", logprob: Any = -0.5, text: Any = None, top: Any = ()) -> Any:
    return {"token": word, "logprob": logprob, "bytes": text, "top_logprobs": top}


@pytest.mark.parametrize(
    "odd",
    [
        told(word=None),
        told(logprob=None),
        told(logprob="-0.5"),
        told(logprob=True),
        told(logprob=math.nan),
        told(logprob=-(10**400)),
        told(text="A"),
        told(text=[300]),
        told(text=["A"]),
        told(top=5),
        told(top=[None]),
        told(top=[told(logprob=math.nan)]),
        None,
        "A",
        {"token": "A"},
    ],
)
def test_what_an_odd_endpoint_reports_is_nothing(odd: Any) -> None:
    assert tokens_of({"content": [odd]}) is None


def test_where_nothing_is_reported_there_is_nothing() -> None:
    for content in (None, [], 5, "", {}):
        assert tokens_of({"content": content}) is None
    assert tokens_of(None) is None
    assert tokens_of({"tokens": ["A"], "token_logprobs": [-0.5]}) is None


def test_tokens_in_all_forms() -> None:
    tokens = tokens_of(
        {
            "content": [
                told("\\xf0\\x9f", logprob=-9999.0, top=None),
                told("?", text=[0xF0, 0x9F], logprob=1e-9, top=[told("A", logprob=-math.inf)]),
            ]
        }
    )
    assert tokens == (
        Token(b"\xf0\x9f", ((b"\xf0\x9f", 0.0),)),
        Token(b"\xf0\x9f", ((b"A", 0.0), (b"\xf0\x9f", 1.0))),
    )


# the bound


@pytest.mark.parametrize("value", [0.8, 0.8 - 1e-12, 1.0])
def test_as_sure_as_was_asked_for(value: float) -> None:
    check_sure(choosing("a", "b", min_confidence=0.8), Confidence(value=value, probabilities={}))
    check_sure(choosing("a", "b"), None)


def test_less_sure_or_not_known() -> None:
    decision = choosing("a", "b", min_confidence=0.8)
    with pytest.raises(Misfit, match=r"^the answer has a confidence of 0.799999, below the min_confidence of 0.8$"):
        check_sure(decision, Confidence(value=0.799999, probabilities={}))
    with pytest.raises(Misfit, match="reported no log-probabilities that can be read; take a model that"):
        check_sure(decision, None)


@pytest.mark.parametrize("least", [0, -1, 1.01, math.nan, math.inf, True, "0.8", [0.8]])
def test_a_bound_that_is_none_is_refused(least: Any) -> None:
    (fault,) = choosing("a", "b", min_confidence=least).faults()
    assert fault.startswith("min_confidence is ")
    assert fault.endswith("it must be a number above 0 and at most 1")


@pytest.mark.parametrize("kind", [int, float])
def test_a_bound_needs_choices_or_bool(kind: type) -> None:
    decision = Decision("?", output_type=kind, reads=("x",), min_confidence=0.5)
    assert decision.faults() == ["min_confidence needs choices or bool: of other answers no probability is known"]
    assert Decision("?", output_type=bool, reads=("x",), min_confidence=1).faults() == []
    assert "min_confidence=0.5" in repr(decision)


# over HTTP


@settings(max_examples=25, deadline=None)
@given(shares(), st.data(), st.integers(0, 20), st.booleans())
async def test_over_http_it_is_what_the_server_set(
    given: tuple[tuple[str, ...], list[float]], data: st.DataObject, most: int, with_bytes: bool
) -> None:
    choices, probabilities = given
    of = dict(zip(choices, probabilities, strict=True))
    answer = data.draw(st.sampled_from(choices))
    rules = {
        "endpoint": {"top_logprobs": most, "token_bytes": with_bytes},
        "rules": [{"probabilities": of, "answer": answer}],
    }
    async with ModelServer(rules=rules) as server:
        client = OpenAIClient(Endpoint(provider="simulated", base_url=server.base_url))
        record = await Desk(client, open_store("memory://")).decide(choosing(*choices), {"x": 1})
        await client.close()
    ranked = sorted(choices, key=lambda choice: -of[choice])[:most]
    seen = {choice: of[choice] for choice in of if choice in ranked or choice == answer}
    whole = sum(seen.values()) if len(seen) > 1 else 1.0
    assert record.answer == answer
    assert record.probabilities == pytest.approx({choice: mass / whole for choice, mass in seen.items()}, abs=WITHIN)
    assert record.confidence == pytest.approx(of[answer] / whole, abs=WITHIN)
    assert server.calls == 1


async def test_in_a_flow() -> None:
    rules = [{"when": {"x": 1}, "probabilities": {"a": 0.9, "b": 0.1}}, {"probabilities": {"a": 0.6, "b": 0.4}}]
    decision = choosing("a", "b", min_confidence=0.8, fallback="b", output_key="way")
    chain = Chain("sure").add_step("decide", decision)
    async with ModelServer(rules=rules) as server:
        endpoint = Endpoint(provider="simulated", base_url=server.base_url)
        sure, unsure = [await run(chain, {"x": x}, endpoint=endpoint) for x in (1, 2)]
        calls = server.calls
    assert ([sure.data["way"], unsure.data["way"]], calls) == (["a", "b"], 2)
    assert sure.decisions["decide"]["confidence"] == pytest.approx(0.9, abs=WITHIN)
    record = unsure.decisions["decide"]
    assert (record["decided_by"], record["proposed"]) == ("fallback", "a")
    assert record["probabilities"] == pytest.approx({"a": 0.6, "b": 0.4}, abs=WITHIN)


@pytest.mark.parametrize("wording", ["answer", "json", "block"])
async def test_an_endpoint_without_schema_reports_as_well(client_of: ClientFactory, wording: str) -> None:
    rules = {
        "endpoint": {"json_schema": "refused", "without_schema": wording},
        "rules": [{"probabilities": {"ship_late": 0.5, "ship": 0.3, "hold": 0.2}, "reason": "r"}],
    }
    async with ModelServer(rules=rules) as server:
        desk = Desk(client_of(server), open_store("memory://"))
        record = await desk.decide(choosing("hold", "ship", "ship_late"), {"x": 1})
    assert (record.answer, record.confidence) == ("ship_late", pytest.approx(0.5, abs=WITHIN))
    expected = {"hold": 0.2, "ship": 0.3, "ship_late": 0.5}
    if wording == "answer":
        del expected["ship"]  # that a text ends is told by no token
    assert record.probabilities == pytest.approx(expected, abs=WITHIN)


async def test_bool_over_http_and_what_is_outside(client_of: ClientFactory) -> None:
    rules = [{"probabilities": {"true": 0.5, "false": 0.3}, "outside": {"maybe": 0.2}}]
    async with ModelServer(rules=rules) as server:
        desk = Desk(client_of(server), open_store("memory://"))
        record = await desk.decide(Decision("?", output_type=bool, reads=("x",)), {"x": 1})
    assert (record.answer, record.confidence) == (True, pytest.approx(0.625, abs=WITHIN))
    assert record.probabilities == pytest.approx({"true": 0.625, "false": 0.375}, abs=WITHIN)
