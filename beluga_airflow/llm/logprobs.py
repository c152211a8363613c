"""The log-probabilities that an endpoint reports, as far as they can be read."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple, NoReturn

__all__ = ["Token", "tokens_of"]

BYTE = re.compile(rb"\\x([0-9a-fA-F]{2})")


class Token(NamedTuple):
    """A token of an answer: its UTF-8, and the probabilities of all that were reported for its place, itself included.

    Two that are reported may have the same text.
    """

    text: bytes
    reported: tuple[tuple[bytes, float], ...]


def tokens_of(logprobs: Any) -> tuple[Token, ...] | None:
    """The tokens in what the API has under ``logprobs``; None where there are none that can be read.

    It is taken as it came from the endpoint, unchecked.
    """
    try:
        return tuple(_token(told) for told in logprobs["content"]) or None
    except (AttributeError, LookupError, TypeError, ValueError, OverflowError):
        return None


def _token(told: Any) -> Token:
    text = _text(told)
    reported = [(_text(other), _probability(other)) for other in told.get("top_logprobs") or ()]
    # the one that was taken may be less probable than all that are listed
    if all(other != text for other, _ in reported):
        reported.append((text, _probability(told)))
    return Token(text, tuple(reported))


def _text(told: Any) -> bytes:
    given = told.get("bytes")
    if given is not None:
        return bytes(given) if isinstance(given, list) else _refuse(given)
    # where no bytes are told, a token that ends inside a character has them as text
    return BYTE.sub(lambda found: bytes.fromhex(found[1].decode()), told["token"].encode(errors="surrogatepass"))


def _probability(told: Any) -> float:
    value = told["logprob"]
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        _refuse(value)
    return math.exp(min(value, 0.0))


def _refuse(value: object) -> NoReturn:
    raise TypeError(f"a {type(value).__name__} where log-probabilities are reported")
