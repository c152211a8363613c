"""What holds where nobody says otherwise, and the one place where a flow's open questions are settled."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.graph import Retry, Shape
from beluga_airflow.graph.retry import is_number, is_whole
from beluga_airflow.graph.shape import RESULT, Kind

__all__ = [
    "RULES",
    "ChainSettings",
    "GraphSettings",
    "LLMSettings",
    "Settings",
    "StateSettings",
    "TemporalSettings",
    "WorkflowSettings",
]

PROVIDERS = (
    *("openai", "azure", "anthropic", "gemini", "groq", "mistral", "deepseek", "xai", "together", "fireworks"),
    *("openrouter", "cohere", "perplexity", "cerebras", "sambanova", "nvidia", "huggingface", "deepinfra"),
    *("ollama", "lmstudio", "vllm", "simulated"),
)
"""The names in ``llm/presets.py``."""
URL = re.compile(r"memory://.*|sqlite:////.+|rediss?://.+|postgres(?:ql)?://(?:[^@/]*@)?[^@]+")
"""What ``state.open_store`` opens, the same from any folder.

What is behind an @ or a / in a password libpq takes for the host, which messages show.
"""
ADDRESS = re.compile(r"(?:[^\s/:@\[\]]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
SECONDS: tuple[str, Callable[[Any], bool]] = (
    "seconds, above 0 and finite",
    lambda value: is_number(value) and 0 < value < math.inf,
)
NAME: tuple[str, Callable[[Any], bool]] = ("a text of printable characters", lambda value: _is_text(value))
RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "timeout": SECONDS,
    "step_timeout": SECONDS,
    "max_workers": ("a whole number, 1 or more", lambda value: is_whole(value) and value >= 1),
    "max_retries": ("a whole number, 0 or more", lambda value: is_whole(value) and value >= 0),
    "parallel_execution": ("True or False", lambda value: isinstance(value, bool)),
    "address": ("host:port, such as localhost:7233", lambda value: _is_text(value) and bool(ADDRESS.fullmatch(value))),
    "namespace": NAME,
    "task_queue": NAME,
    "provider": (f"one of {', '.join(PROVIDERS)}", lambda value: value in PROVIDERS),
    "model": NAME,
    "url": (
        "the URL of a state store, such as sqlite:////path/to/state.db, redis://host:6379/0 or "
        "postgresql://user:password@host/database, with signs such as @ or / in a password as %40, %2F",
        lambda value: isinstance(value, str) and bool(URL.fullmatch(value)),
    ),
}
"""What a setting of this name must be."""


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.strip() != "" and value.isprintable()


class _Checked:
    """Settings that can hold.

    Raises:
        InvalidSetting: one cannot.
    """

    def __post_init__(self) -> None:
        for setting in fields(self):  # type: ignore[arg-type]  # all that inherit are dataclasses
            name, value = setting.name, getattr(self, setting.name)
            kind, holds = RULES.get(name, (None, None))
            if holds is None or holds(value) or (value is None and setting.default is None):
                continue
            shown = repr(value) if setting.repr else "..."
            raise InvalidSetting(f"{type(self).__name__}({name}={shown}): it must be {kind}")


@dataclass(frozen=True, kw_only=True)
class ChainSettings(_Checked):
    """Chains: ``timeout`` in seconds for the whole; ``max_retries`` of a step, after its first attempt."""

    timeout: float = 300.0
    max_retries: int = 3


@dataclass(frozen=True, kw_only=True)
class GraphSettings(_Checked):
    """Graphs: ``timeout`` in seconds for the whole; ``max_retries`` of a step, after its first attempt."""

    timeout: float = 600.0
    max_workers: int = 10
    parallel_execution: bool = True
    max_retries: int = 2


@dataclass(frozen=True, kw_only=True)
class TemporalSettings(_Checked):
    """Where Temporal is, when no connection says."""

    address: str = "localhost:7233"
    namespace: str = "default"
    task_queue: str = "beluga-workflows"


@dataclass(frozen=True, kw_only=True)
class WorkflowSettings(_Checked):
    """Flows on Temporal.

    Args:
        timeout: seconds, for a flow that has none of its own.
        max_retries: of a step that has no ``Retry``, after its first attempt; None: as everywhere else.
        temporal: the server.
    """

    timeout: float = 3600.0
    max_retries: int | None = None
    temporal: TemporalSettings = field(default_factory=TemporalSettings)


@dataclass(frozen=True, kw_only=True)
class LLMSettings(_Checked):
    """The model, when no connection says. ``timeout`` in seconds for one call."""

    provider: str = "openai"
    model: str = "gpt-4o"
    timeout: float = 30.0


@dataclass(frozen=True, kw_only=True)
class StateSettings(_Checked):
    """The state store, when no connection says; None: a SQLite file under ``AIRFLOW_HOME``."""

    # it may hold a password
    url: str | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Settings(_Checked):
    """The settings in force. ``step_timeout`` is in seconds, for one attempt of a step."""

    chain: ChainSettings = field(default_factory=ChainSettings)
    graph: GraphSettings = field(default_factory=GraphSettings)
    workflow: WorkflowSettings = field(default_factory=WorkflowSettings)
    llm: LLMSettings = field(default_factory=LLMSettings)
    state: StateSettings = field(default_factory=StateSettings)
    step_timeout: float = 60.0

    def settle(self, shape: Shape, *, durable: bool = False) -> Shape:
        """The shape with nothing left open, as a runtime runs it.

        Args:
            shape: of a checked flow.
            durable: whether it runs on Temporal.
        """
        own = self._of(shape.kind)
        steps = tuple(
            replace(
                step,
                timeout=step.timeout or self.step_timeout,
                retry=step.retry or self._retry(shape, step.name, durable=durable),
            )
            for step in shape.steps
        )
        groups = tuple(replace(group, max_workers=1) if group.parallel is False else group for group in shape.groups)
        parallel = self.graph.parallel_execution if shape.parallel is None else shape.parallel
        return replace(
            shape,
            steps=steps,
            groups=groups,
            parallel=parallel,
            max_workers=(shape.max_workers or self.graph.max_workers) if parallel else 1,
            timeout=shape.timeout or (self.workflow.timeout if durable else own.timeout),
        )

    def _retry(self, shape: Shape, step: str, *, durable: bool) -> Retry:
        if durable and self.workflow.max_retries is not None:
            return Retry(maximum_attempts=self.workflow.max_retries + 1)
        # a step of a nested flow has that flow's default, as when the flow runs by itself; its end is the outer's
        around = [group for group in shape.around[step] if step != f"{group.path}.{RESULT}"]
        return Retry(maximum_attempts=self._of(around[-1].kind if around else shape.kind).max_retries + 1)

    def _of(self, kind: Kind) -> ChainSettings | GraphSettings:
        return self.chain if kind == "chain" else self.graph
