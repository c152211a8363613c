"""What a rules file of the model server says: what its endpoint can do, which troubles come, and the rules.

The file (YAML, or JSON by its suffix) is a list of rules, or a mapping, every part of it optional::

    endpoint: {json_schema: refused, without_schema: block, top_logprobs: 2}
    models:
      gullible: {obedient: true}        # over `endpoint`, for this model
    troubles:
      - {kind: rate_limit, retry_after: 2, calls: [1]}
    rules:
      - answer: standard
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.llm.model_requests import MOST_TOP_LOGPROBS, ChatRequest, RefusedRequest, Schema
from beluga_airflow.llm.model_rules import Rule, Wording, describe
from beluga_airflow.llm.model_troubles import TROUBLE, Trouble

SECTIONS = ("endpoint", "models", "troubles", "rules")
T = TypeVar("T")


class Traits(BaseModel, extra="forbid", frozen=True):
    """What an endpoint can do, for one model.

    Args:
        json_schema: what becomes of a request for a JSON schema.
        without_schema: how an answer is worded where no schema is asked for, or the schema is ignored.
        logprobs: what becomes of a request for log-probabilities.
        top_logprobs: the most alternatives that it reports for a token.
        above: what becomes of a request for more of them.
        token_bytes: whether the bytes of tokens are told.
        obedient: whether the model does what the data tells it.
        unknown_models: what becomes of a request to a model that ``models`` does not name.
    """

    json_schema: Literal["enforced", "refused", "ignored"] = "enforced"
    without_schema: Wording = "answer"
    logprobs: Literal["reported", "none", "refused"] = "reported"
    top_logprobs: int = Field(default=MOST_TOP_LOGPROBS, ge=0, le=MOST_TOP_LOGPROBS)
    above: Literal["capped", "refused"] = "capped"
    token_bytes: bool = True
    obedient: bool = False
    unknown_models: Literal["answered", "refused"] = "answered"

    def check(self, asked: ChatRequest) -> None:
        """See that the endpoint can do what is asked.

        Raises:
            RefusedRequest: it cannot; names the parameter.
        """
        if self.json_schema == "refused" and asked.asks_for_json_schema:
            raise _unsupported("response_format", "of type 'json_schema' is not supported with this model")
        if self.logprobs == "refused" and asked.logprobs:
            raise _unsupported("logprobs", "is not supported with this model")
        if self.above == "refused" and (asked.top_logprobs or 0) > self.top_logprobs:
            raise _unsupported("top_logprobs", f"must be at most {self.top_logprobs}")

    def schema_for(self, asked: ChatRequest) -> Schema | None:
        """The schema that the answer will fit."""
        return None if self.json_schema == "ignored" and asked.asks_for_json_schema else asked.schema_asked


def _unsupported(param: str, why: str) -> RefusedRequest:
    return RefusedRequest(f"Invalid parameter: '{param}' {why}.", code="unsupported_parameter", param=param)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """All that a rules file says."""

    endpoint: Traits = field(default_factory=Traits)
    models: Mapping[str, Traits] = field(default_factory=dict)
    troubles: tuple[Trouble, ...] = ()
    rules: tuple[Rule, ...] = ()

    def traits(self, model: str) -> Traits:
        """What the endpoint can do for a model.

        Raises:
            RefusedRequest: it does not know the model.
        """
        own = self.models.get(model)
        if own is None and self.endpoint.unknown_models == "refused":
            raise RefusedRequest(
                f"The model '{model[:100]}' does not exist or you do not have access to it.",
                status=404,
                code="model_not_found",
                param="model",
            )
        return own or self.endpoint


def load_setup(source: str | Path | Mapping[str, Any] | Iterable[Rule | Mapping[str, Any]]) -> Setup:
    """What a rules file says, or Python objects of the same form.

    Raises:
        InvalidSetting: the file cannot be read, or something in it is wrong; names the file, the entry, the
            field and, in YAML, the line.
    """
    if isinstance(source, Mapping):
        return _Reader("the given rules").setup(source)
    if not isinstance(source, str | Path):
        return _Reader("the given rules").setup(list(source))
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
        is_json = path.suffix == ".json"
        raw = json.loads(text) if is_json else yaml.safe_load(text)
        node = None if is_json else yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InvalidSetting(
            f"{path}: the rules of the model server cannot be read: {error}; mend the file, or name another"
        ) from error
    return _Reader(str(path), node).setup(raw)


class _Reader:
    """Reads all parts before it tells their faults, so that they can be mended at once."""

    def __init__(self, where: str, node: yaml.Node | None = None) -> None:
        self._where = where
        self._node = node
        self._faults: list[str] = []

    def setup(self, raw: object) -> Setup:
        if isinstance(raw, list):
            setup = Setup(rules=tuple(self._each("rule", raw, TypeAdapter(Rule), ()).values()))
        elif isinstance(raw, Mapping):
            setup = self._mapping(raw)
        else:
            raise InvalidSetting(
                f"{self._where}: rules must be a list, not {type(raw).__name__}; begin each with '- ', "
                f"or write a mapping of {', '.join(SECTIONS)}"
            )
        if self._faults:
            raise InvalidSetting("\n".join(self._faults))
        return setup

    def _mapping(self, raw: Mapping[str, Any]) -> Setup:
        for name in raw.keys() - set(SECTIONS):
            self._fault(f"{name}: unknown; there can be: {', '.join(SECTIONS)}", (name,))
        endpoint = self._one("endpoint", raw.get("endpoint") or {}, TypeAdapter(Traits), ("endpoint",)) or Traits()
        models = {}
        for name, own in self._section(raw, "models", Mapping).items():
            traits = self._one(f"models.{name}", own or {}, TypeAdapter(Traits), ("models", name))
            if traits is not None:
                models[str(name)] = endpoint.model_copy(update=traits.model_dump(exclude_unset=True))
        troubles = self._each("trouble", self._section(raw, "troubles", list), TROUBLE, ("troubles",))
        for number, trouble in troubles.items():
            if not (trouble.calls or trouble.every or trouble.times):
                self._fault(
                    f"trouble {number}: say when: calls: [1, 2], or every: 1 for always, or times: 1 for the next",
                    ("troubles", number - 1),
                )
        rules = self._each("rule", self._section(raw, "rules", list), TypeAdapter(Rule), ("rules",))
        return Setup(endpoint=endpoint, models=models, troubles=tuple(troubles.values()), rules=tuple(rules.values()))

    def _section(self, raw: Mapping[str, Any], name: str, kind: type[Any]) -> Any:
        section = raw.get(name)
        if isinstance(section, kind):
            return section
        if section is not None:
            wanted = "a list; begin each entry with '- '" if kind is list else "a mapping of model to what it can do"
            self._fault(f"{name}: must be {wanted}", (name,))
        return [] if kind is list else {}

    def _each(self, what: str, raw: list[Any], adapter: TypeAdapter[T], path: tuple[str | int, ...]) -> dict[int, T]:
        read = {n: self._one(f"{what} {n}", item, adapter, (*path, n - 1)) for n, item in enumerate(raw, 1)}
        return {number: entry for number, entry in read.items() if entry is not None}

    def _one(self, what: str, raw: object, adapter: TypeAdapter[T], path: tuple[str | int, ...]) -> T | None:
        try:
            return adapter.validate_python(raw)
        except ValidationError as error:
            for fault in describe(error):
                self._fault(f"{what}, {fault}", path)
            return None

    def _fault(self, text: str, path: tuple[str | int, ...]) -> None:
        line = self._line(path)
        self._faults.append(f"{self._where}, {text}{f' (line {line})' if line else ''}")

    def _line(self, path: tuple[str | int, ...]) -> int | None:
        """Where an entry begins; None where that is not known."""
        node = self._node
        for step in path:
            if isinstance(node, yaml.SequenceNode) and isinstance(step, int):
                node = node.value[step]
            elif isinstance(node, yaml.MappingNode):
                node = next((value for key, value in node.value if key.value == step), None)
        return int(node.start_mark.line) + 1 if node else None
