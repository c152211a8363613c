"""How sure a model was of its choice, by the log-probabilities of the tokens that it might have answered instead."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from beluga_airflow.graph import Decision
from beluga_airflow.llm.answers import Misfit
from beluga_airflow.llm.client import ModelReply
from beluga_airflow.llm.logprobs import Token
from beluga_airflow.llm.offers import offered

__all__ = ["Confidence", "check_sure", "confidence_of", "logprobs_for"]

WITHIN = 1e-9
"""What a probability may be short of by its way through a logarithm."""
SPACE = b" \t\r\n\f\v"
BETWEEN = re.compile(r"[\s,:]*")
END = b"\0"
"""Behind a bare answer, which nothing follows: no token goes past it."""

Ways = Mapping[str, tuple[bytes, ...]]
"""The choices, and how each may be written, from the content's beginning."""


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """How probable the answer was among the choices of which the endpoint reported anything.

    Args:
        value: of the answer; where no other choice was reported its own probability, since there is nothing to compare.
        probabilities: of each choice that was reported, the answer included, by name (of a bool ``true``, ``false``).
    """

    value: float
    probabilities: dict[str, float]


def logprobs_for(decision: Decision) -> Literal["no", "wanted", "needed"]:
    """Whether a decision has a use for log-probabilities: where its answer is one of a few."""
    if decision.choices is None and decision.output_type is not bool:
        return "no"
    return "wanted" if decision.min_confidence is None else "needed"


def check_sure(decision: Decision, confidence: Confidence | None) -> None:
    """Hold an answer to the decision's ``min_confidence``.

    Raises:
        Misfit: it is below, or not known.
    """
    least = decision.min_confidence
    if least is None:
        return
    if confidence is None:
        raise Misfit(
            "how sure the model was is not known, since the endpoint reported no log-probabilities that can be read; "
            "take a model that reports them, or leave out min_confidence"
        )
    if confidence.value < least - WITHIN:
        raise Misfit(f"the answer has a confidence of {confidence.value:.6g}, below the min_confidence of {least:g}")


def confidence_of(decision: Decision, answer: Any, reply: ModelReply) -> Confidence | None:
    """The confidence in a reply's answer; None where the endpoint did not report what it takes."""
    if not reply.tokens or logprobs_for(decision) == "no":
        return None
    name = json.dumps(answer) if isinstance(answer, bool) else answer
    head, ways = _ways(decision, reply.content)
    return _walk(ways, head, name, reply.tokens, _compact(reply.content))


def _walk(ways: Ways, head: int, answer: str, tokens: tuple[Token, ...], content: bytes) -> Confidence | None:
    """Go along the tokens until they mean the answer and nothing else, and see at each what it might have been."""
    masses = dict.fromkeys(ways, 0.0)
    elsewhere = unreported = 0.0
    reach, path, open_to = 1.0, b"", set(ways)
    for token in tokens:
        here = path + _squeezed(token.text)
        if not content.startswith(here):
            return None
        taken, others, nobodys = _look(ways, head, path, token)
        for name, probability in others:
            masses[name] += reach * probability
        elsewhere += reach * nobodys
        meant = _meant(ways, here)
        if len(meant) < len(open_to):
            unreported += reach * max(0.0, 1.0 - sum(probability for _, probability in token.reported))
        reach, path, open_to = reach * taken, here, meant
        if len(meant) <= 1:
            break
    if open_to != {answer} or not reach:
        return None
    masses[answer] += reach
    seen = {name: mass for name, mass in masses.items() if mass}
    is_alone = len(seen) == 1 and not elsewhere
    whole = sum(seen.values()) + (unreported if is_alone else elsewhere)
    probabilities = {name: mass / whole for name, mass in seen.items()}
    return Confidence(value=probabilities[answer], probabilities=probabilities)


def _look(ways: Ways, head: int, path: bytes, token: Token) -> tuple[float, list[tuple[str, float]], float]:
    """How probable a token was, what led to other choices instead, and what is nobody's but counts against the answer.

    What leads to one choice is that choice's. What is inside a choice, behind the ``head``, and leads to several is
    nobody's. What is before it, or means no choice, says nothing.
    """
    here = path + _squeezed(token.text)
    taken = nobodys = going_on = 0.0
    others = []
    for text, probability in token.reported:
        there = path + _squeezed(text)
        if there == here:
            taken += probability
            continue
        leads_to = _meant(ways, there)
        going_on += probability if leads_to else 0.0
        if len(leads_to) == 1:
            others.append((leads_to.pop(), probability))
        elif leads_to and len(there) > head:
            nobodys += probability
    if any(way == path + END for several in ways.values() for way in several):
        # a bare answer might have ended here, for which no token of it stands
        nobodys += max(0.0, 1.0 - taken - going_on)
    return taken, others, nobodys


def _meant(ways: Ways, text: bytes) -> set[str]:
    """The choices that a beginning of the content may come to mean."""
    return {
        name for name, several in ways.items() if any(way.startswith(text) or text.startswith(way) for way in several)
    }


def _ways(decision: Decision, content: str) -> tuple[int, Ways]:
    """The ways in which the content might have held each choice, in the form that it holds the answer in.

    With the bytes that are before the choice itself.
    """
    texts = offered(decision)
    bare = content.strip()
    is_bare = bare in texts or bare in decision.labels or (not texts and bare in ("true", "false"))
    at = 0 if is_bare else _place(content)
    head = content[:at]
    if not texts:
        ends = (END,) if is_bare else (b",", b"}")
        ways = {name: tuple(_compact(head + name) + end for end in ends) for name in ("true", "false")}
        return len(_compact(head)), ways
    given = bare if is_bare else json.JSONDecoder().raw_decode(content, at)[0]
    written = {name: text if given in texts else name for text, name in texts.items()}
    if is_bare:
        return 0, {name: (_compact(text) + END,) for name, text in written.items()}
    return len(_compact(f'{head}"')), {
        name: tuple(_compact(head + json.dumps(text, ensure_ascii=escaped)) for escaped in (False, True))
        for name, text in written.items()
    }


def _place(content: str) -> int:
    """Where the value of "answer" begins, in content that has been read."""
    decoder = json.JSONDecoder()
    at = content.index("{") + 1
    while True:
        name, at = decoder.raw_decode(content, _past(content, at))
        at = _past(content, at)
        if name == "answer":
            return at
        _, at = decoder.raw_decode(content, at)


def _past(content: str, at: int) -> int:
    found = BETWEEN.match(content, at)
    return found.end() if found else at


def _compact(text: str) -> bytes:
    return _squeezed(text.encode(errors="surrogatepass"))


def _squeezed(text: bytes) -> bytes:
    # white space means nothing around a choice, and tokens come with and without it
    return text.translate(None, SPACE)
