"""How many tokens a text and a request may have, before anybody has counted them."""

from __future__ import annotations

import json
import re

from beluga_airflow.llm.client import ModelRequest, Usage

__all__ = ["PER_MESSAGE", "estimated", "tokens"]

PER_MESSAGE = 6
"""Tokens that a message costs beside its text: OpenAI's own count is 4, other chat formats take 5."""
WORD = re.compile(r" ?[A-Za-z]+")


def tokens(text: str) -> int:
    """About how many tokens a model reads in a text, rather too many than too few.

    Every model counts in its own way, and none of their tokenizers is at hand. All of them can write any byte as one
    token, so that a text never has more tokens than bytes; they differ in what they merge. Merged here are only the
    letters of a word, two to a token, with the space before it: in English words it is four or five, in random letters
    about two. So digits, punctuation and the escapes of other scripts count fully, and English JSON about twice.
    """
    words = WORD.findall(text)
    merged = sum(len(word) - (len(word.lstrip(" ")) + 1) // 2 for word in words)
    return len(text.encode(errors="surrogatepass")) - merged


def estimated(request: ModelRequest) -> Usage:
    """What a request may use, rather too much than too little: limits and budgets book it before the call.

    That is the tokens of its messages and its schema, and the most that the answer may have.
    """
    asked = sum(PER_MESSAGE + tokens(message["content"]) for message in request.messages)
    return Usage(input=asked + tokens(json.dumps(dict(request.schema))), output=request.max_tokens)
