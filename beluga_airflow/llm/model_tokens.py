"""How the model server cuts its answers into tokens, and how probable it reports each to have been.

Text is cut as real tokenizers cut it: a word with the space or the one sign before it, up to three digits, a run
of signs with the space before it, white space. What is longer than `TOKEN_BYTES` in UTF-8 is cut again there, in
the middle of a character too::

    {"answer": "ship_late"}   ->   {" answe r ":  " ship _late "}
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

TOKEN_BYTES = 5

_PIECE = re.compile(
    r"(?:[^\w\r\n]|_)?[^\W\d_]+"  # a word
    r"|\d{1,3}"
    r"| ?(?:[^\w\s]|_)+[\r\n]*"  # signs
    r"|\s+(?!\S)|\s+"  # of the white space before a word, the last is the word's
)


def tokens(text: str) -> list[bytes]:
    """The tokens of a text; together they are its UTF-8."""
    # half a character, which JSON may hold, is cut like any other
    pieces = [piece.encode(errors="surrogatepass") for piece in _PIECE.findall(text)]
    return [piece[at : at + TOKEN_BYTES] for piece in pieces for at in range(0, len(piece), TOKEN_BYTES)]


def logprobs(
    text: str, probabilities: Mapping[str, float], *, most: int | None, with_bytes: bool = True
) -> list[dict[str, Any]]:
    """The log-probabilities of a text's tokens, as OpenAI's ``choices[0].logprobs.content`` has them.

    Args:
        text: what is answered.
        probabilities: of every text that might have been, this one with more than 0 included; their sum is 1.
        most: alternatives to report for each token, the most probable first; None reports no list of them.
        with_bytes: whether ``bytes`` is told, or null.
    """
    paths = [(tokens(other), probability) for other, probability in probabilities.items() if probability > 0]
    content = []
    for place, token in enumerate(tokens(text)):
        whole = math.fsum(probability for _, probability in paths)
        masses = {
            following: math.fsum(probability for path, probability in paths if path[place : place + 1] == [following])
            for following in dict.fromkeys(path[place] for path, _ in paths if place < len(path))
        }
        told = {each: _told(each, mass / whole, with_bytes) for each, mass in masses.items()}
        ranked = sorted(masses, key=lambda each: -masses[each])
        content.append({**told[token], "top_logprobs": [told[each] for each in ranked[: most or 0]]})
        paths = [(path, probability) for path, probability in paths if path[place : place + 1] == [token]]
    return content


def _told(token: bytes, probability: float, with_bytes: bool) -> dict[str, Any]:
    return {
        "token": token.decode(errors="backslashreplace"),
        "logprob": math.log(min(probability, 1.0)),
        "bytes": list(token) if with_bytes else None,
    }


def joined(parts: Sequence[bytes]) -> str:
    """The text of tokens."""
    return b"".join(parts).decode(errors="backslashreplace")
