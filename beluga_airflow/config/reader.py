"""The YAML file: exactly the keys listed here, each fault with its path and line."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from beluga_airflow.config.settings import (
    RULES,
    ChainSettings,
    GraphSettings,
    LLMSettings,
    Settings,
    StateSettings,
    TemporalSettings,
    WorkflowSettings,
)
from beluga_airflow.config.values import FORMS, READERS, Unfilled, filled, variables
from beluga_airflow.errors import InvalidSetting

__all__ = ["KEYS", "ConfigFile", "Origin", "load_settings", "read"]

KEYS = (
    *("orchestration.chain.timeout", "orchestration.chain.max_retries"),
    *("orchestration.graph.max_workers", "orchestration.graph.parallel_execution", "orchestration.graph.timeout"),
    *(f"orchestration.workflow.temporal.{name}" for name in ("address", "namespace", "task_queue")),
    *("orchestration.workflow.timeout", "orchestration.workflow.max_retries"),
    *("llm.provider", "llm.model", "llm.timeout"),
    "state.url",
)
"""All that the file may say."""
SECRET = ("state.url",)
"""Keys whose value no message shows."""
LIMIT = 65_536
"""Bytes of a file: all keys with their comments take a few thousand."""
SHOWN = 80
"""Characters of a text from the file that a message shows."""
PLAIN = tuple(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "timestamp", "merge", "value"))
"""The tags that YAML itself gives to a text; null is no value."""
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
NULL = "tag:yaml.org,2002:null"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a value stands: the line, from 1, and the environment variables that it was filled from."""

    line: int
    variables: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ConfigFile:
    """A file that was read, with where each key in it stands."""

    path: Path
    settings: Settings
    origins: Mapping[str, Origin] = field(default_factory=dict)


def load_settings(path: str | os.PathLike[str]) -> Settings:
    """The settings in a YAML file; what it does not say has its default.

    Args:
        path: of the file.

    Raises:
        InvalidSetting: there is no such file, or something in it cannot be used; says where.
    """
    return read(Path(path)).settings


def read(path: Path) -> ConfigFile:
    """Read a file.

    Raises:
        InvalidSetting: as ``load_settings``.
    """
    root = _composed(path, _text(path))
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for key, node in _entries(path, "", root) if root is not None else ():
        values[key] = _value(path, key, node)
        origins[key] = Origin(line=_line(node), variables=variables(node.value))
    return ConfigFile(path=path, settings=_settings(values), origins=origins)


def _settings(values: Mapping[str, Any]) -> Settings:
    def part(section: str) -> dict[str, Any]:
        return {key.rpartition(".")[2]: value for key, value in values.items() if key.rpartition(".")[0] == section}

    temporal = TemporalSettings(**part("orchestration.workflow.temporal"))
    return Settings(
        chain=ChainSettings(**part("orchestration.chain")),
        graph=GraphSettings(**part("orchestration.graph")),
        workflow=WorkflowSettings(**part("orchestration.workflow"), temporal=temporal),
        llm=LLMSettings(**part("llm")),
        state=StateSettings(**part("state")),
    )


def _text(path: Path) -> str:
    try:
        # before it is opened: to open a pipe is to wait for somebody to write
        if not stat.S_ISREG(path.stat().st_mode):
            raise InvalidSetting(f"{path} is no file; name a YAML file with settings")
        with path.open("rb") as file:
            data = file.read(LIMIT + 1)
    except FileNotFoundError:
        raise InvalidSetting(f"there is no file {path}; make it, or correct the path") from None
    except (OSError, ValueError) as error:  # a null character in a path is a ValueError
        why = getattr(error, "strerror", None) or error
        raise InvalidSetting(f"{path} cannot be read: {why}; see to its permissions") from None
    if len(data) > LIMIT:
        raise InvalidSetting(f"{path} is larger than {LIMIT} bytes; a file with settings is not")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidSetting(f"{path}:{line}: this is no UTF-8; save the file as UTF-8") from None


def _composed(path: Path, text: str) -> yaml.Node | None:
    """The nodes of the text, with their lines; nothing is made of them, whatever their tags say."""
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = QUOTED.sub(_unquoted, error.problem or "it cannot be read")
        raise InvalidSetting(f"{where}: this is no YAML: {problem}; mend the file") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise InvalidSetting(f"{path}:{line}: this is no YAML: it holds a character that YAML has not") from None
    except (yaml.YAMLError, RecursionError, ValueError):
        raise InvalidSetting(f"{path}: this is no YAML that can be read; mend the file") from None


def _unquoted(found: re.Match[str]) -> str:
    """What PyYAML quotes may be from the file: a password, say, that YAML takes for something else."""
    is_sign = len(found[0]) <= len(repr("\t")) or found[0].startswith("'<")
    return found[0] if is_sign else "(...)"


def _entries(path: Path, section: str, node: yaml.Node) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """The keys in a section, with their values, none of them read yet.

    It goes as deep as our keys do, so that an alias leads nowhere.
    """
    known = _under(section)
    if _is_null(node):  # all that is in it is a comment
        return
    if not isinstance(node, yaml.MappingNode):
        what = f"{section!r} is" if section else "the file holds"
        raise InvalidSetting(f"{path}:{_line(node)}: {what} {_kind(node)}, it must be a mapping of: {', '.join(known)}")
    seen: dict[str, int] = {}
    for name_node, value in node.value:
        line = _line(name_node)
        name = name_node.value if isinstance(name_node, yaml.ScalarNode) else None
        key = f"{section}.{name}" if section else str(name)
        if name not in known:
            raise InvalidSetting(f"{path}:{line}: {_unknown(section, name)}")
        if name in seen:
            raise InvalidSetting(f"{path}:{line}: the key {key!r} is there twice, in line {seen[name]} too; drop one")
        seen[name] = line
        if key not in KEYS:
            yield from _entries(path, key, value)
        elif isinstance(value, yaml.ScalarNode):
            yield key, value
        else:
            raise InvalidSetting(f"{path}:{_line(value)}: {key!r} is {_kind(value)}, it must be {_wanted(key)}")


def _value(path: Path, key: str, node: yaml.ScalarNode) -> Any:
    where = f"{path}:{_line(node)}"
    if _is_null(node):
        raise InvalidSetting(f"{where}: {key!r} has no value; give it one, or leave the key out")
    if node.tag not in PLAIN:
        raise InvalidSetting(f"{where}: {key!r} has a tag (!...), which means nothing here; leave it out")
    name = key.rpartition(".")[2]
    try:
        value = READERS.get(name, str)(filled(node.value).strip())
    except Unfilled as error:
        raise InvalidSetting(f"{where}: {key!r} {error}") from None
    except ValueError:
        value = None
    if not RULES[name][1](value):
        raise InvalidSetting(f"{where}: {key!r} is {_shown(key, node)}, it must be {_wanted(key)}") from None
    return value


def _under(section: str) -> list[str]:
    """The names directly under a section."""
    start = f"{section}." if section else ""
    return [*dict.fromkeys(key.removeprefix(start).partition(".")[0] for key in KEYS if key.startswith(start))]


def _unknown(section: str, name: str | None) -> str:
    known = _under(section)
    place = f"under {section!r}" if section else "at the top"
    told = f"{place} there can be: {', '.join(known)}"
    if name is None:
        return f"a key is no text; {told}"
    dotted = f"{section}.{name}" if section else name
    start = f"{section}." if section else ""
    elsewhere = {part for key in KEYS for part in _ends(key) if part.rpartition(".")[2] == name}
    near = [start + match for match in get_close_matches(name.lower(), known, n=1, cutoff=0.75)]
    meant = near or ([*elsewhere] if len(elsewhere) == 1 else [])
    suggestion = f": did you mean {meant[0]!r}?" if meant else ";"
    return f"unknown key {_short(dotted)}{suggestion} {told}"


def _ends(key: str) -> list[str]:
    """A key, and the sections that it is in."""
    parts = key.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _wanted(key: str) -> str:
    name = key.rpartition(".")[2]
    return FORMS.get(name) or RULES[name][0]


def _shown(key: str, node: yaml.ScalarNode) -> str:
    """A value as a message may show it: as it stands in the file, with nothing filled in."""
    if key in SECRET:
        return "something else (it is not shown, as it may hold a password)"
    named = ", ".join(variables(node.value))
    return f"{_short(node.value)}, filled from {named}" if named else _short(node.value)


def _short(text: str) -> str:
    shown = ascii(text)
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == NULL


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a single value"


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
