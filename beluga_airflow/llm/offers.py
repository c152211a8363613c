"""The choices as a model is offered them: each behind a sign of its own, so that the first token of it decides."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, product
from string import ascii_lowercase, ascii_uppercase, digits

from beluga_airflow.graph import Decision

__all__ = ["offered"]

SIGNS = ascii_uppercase + ascii_lowercase + digits


def offered(decision: Decision) -> dict[str, str]:
    """What is offered, to the choice that it means: ``"A: expedite"`` to ``"expedite"``; empty without choices."""
    choices = decision.labels
    return {f"{sign}: {choice}": choice for sign, choice in zip(_signs(choices), choices, strict=False)}


def _signs(choices: Sequence[str]) -> list[str]:
    """A sign for each, of one character where there are enough.

    None that a choice looks like: a model that answers a sign, or a choice by its name, must not mean two things.
    """
    taken = {choice.partition(":")[0] for choice in choices}
    for length in count(1):
        signs = [sign for sign in map("".join, product(SIGNS, repeat=length)) if sign not in taken]
        if len(signs) >= len(choices):
            return signs[: len(choices)]
    raise AssertionError("there are signs of any length")
