"""How the texts of the YAML file are read: durations, whole numbers, true and false, ``${VAR}``."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["FORMS", "READERS", "Unfilled", "filled", "variables"]

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3_600.0, "d": 86_400.0}
NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,15})?"
PARTS = re.compile(rf"({NUMBER})(ms|[smhd])")
ISO = re.compile(r"P(?=.*[0-9])(?!.*[0-9]{10})[0-9.DW]*(?:T[0-9.HMS]*)?")
"""Of what pendulum reads: no years and months, which have no one length, and no number that it would make smaller."""
VARIABLE = re.compile(r"(\$?)\$\{([^}]*)(\}?)")
"""``${NAME}``; with another ``$`` before it it is left as it is, without that one."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


class Unfilled(Exception):
    """A ``${VAR}`` that cannot be filled in; says why, and never what another one holds."""


def seconds(text: str) -> float:
    """The seconds of ``300s``, ``5m``, ``1h30m``, ``PT5M`` or a plain number.

    Raises:
        ValueError: it is none of them.
    """
    if re.fullmatch(NUMBER, text):
        return float(text)
    if re.fullmatch(rf"(?:{PARTS.pattern})+", text):
        return sum(float(number) * UNITS[unit] for number, unit in PARTS.findall(text))
    if ISO.fullmatch(text):
        return _iso(text)
    raise ValueError("no duration")


def whole(text: str) -> int:
    """A whole number.

    Raises:
        ValueError: it is none, or beyond what any of these settings can mean.
    """
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise ValueError("no whole number")
    return int(text)


def flag(text: str) -> bool:
    """True or false.

    Raises:
        ValueError: it is neither.
    """
    if text.lower() not in FLAGS:
        raise ValueError("neither true nor false")
    return FLAGS[text.lower()]


READERS: Mapping[str, Callable[[str], Any]] = {
    "timeout": seconds,
    "max_workers": whole,
    "max_retries": whole,
    "parallel_execution": flag,
}
"""Of a key with this last name; every other is a text."""
FORMS = {
    "timeout": "a duration above 0: 300s, 5m, 1h, PT5M, or a number of seconds",
    "parallel_execution": "true or false",
}
"""What such a key must be, where the file has it otherwise than Python."""


def variables(text: str) -> tuple[str, ...]:
    """The names of the environment variables in a text."""
    return tuple(name for escaped, name, _ in VARIABLE.findall(text) if not escaped)


def filled(text: str) -> str:
    """The text with environment variables in place of their names.

    Raises:
        Unfilled: one is not set, or is no name.
    """

    def value(found: re.Match[str]) -> str:
        escaped, name, end = found.groups()
        if escaped:
            return found[0][1:]
        if not end or not NAME.fullmatch(name):
            # not the text itself: a password may look like that
            raise Unfilled("has a '${' without the name of an environment variable and a '}'; write '$${' for '${'")
        if name not in os.environ:
            raise Unfilled(f"asks for the environment variable {name}, which is not set in this process")
        return os.environ[name]

    return VARIABLE.sub(value, text)


def _iso(text: str) -> float:
    # 40 ms, for a form that few files have
    import pendulum

    try:
        found = pendulum.parse(text)
    except ValueError as error:
        raise ValueError("no duration") from error
    if not isinstance(found, pendulum.Duration):
        raise ValueError("no duration")
    return float(found.total_seconds())
