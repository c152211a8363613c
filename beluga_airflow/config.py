"""What holds where nobody says otherwise, and the one place where a flow's open questions are settled."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from beluga_airflow.graph import Retry, Shape

__all__ = ["ChainSettings", "GraphSettings", "LLMSettings", "Settings", "TemporalSettings", "WorkflowSettings"]


@dataclass(frozen=True, kw_only=True)
class ChainSettings:
    """Chains: ``timeout`` in seconds for the whole; ``max_retries`` of a step, after its first attempt."""

    timeout: float = 300.0
    max_retries: int = 3


@dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """Graphs: ``timeout`` in seconds for the whole; ``max_retries`` of a step, after its first attempt."""

    timeout: float = 600.0
    max_workers: int = 10
    parallel_execution: bool = True
    max_retries: int = 2


@dataclass(frozen=True, kw_only=True)
class TemporalSettings:
    """Where Temporal is, when no connection says."""

    address: str = "localhost:7233"
    namespace: str = "default"
    task_queue: str = "beluga-workflows"


@dataclass(frozen=True, kw_only=True)
class WorkflowSettings:
    """Flows on Temporal: ``timeout`` in seconds bounds a flow that has none of its own."""

    timeout: float = 3600.0
    temporal: TemporalSettings = field(default_factory=TemporalSettings)


@dataclass(frozen=True, kw_only=True)
class LLMSettings:
    """The model, when no connection says. ``timeout`` in seconds for one call."""

    provider: str = "openai"
    model: str = "gpt-4o"
    timeout: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings in force. ``step_timeout`` is in seconds, for one attempt of a step."""

    chain: ChainSettings = field(default_factory=ChainSettings)
    graph: GraphSettings = field(default_factory=GraphSettings)
    workflow: WorkflowSettings = field(default_factory=WorkflowSettings)
    llm: LLMSettings = field(default_factory=LLMSettings)
    step_timeout: float = 60.0

    def settle(self, shape: Shape, *, durable: bool = False) -> Shape:
        """The shape with nothing left open, as a runtime runs it.

        Args:
            shape: of a checked flow.
            durable: whether it runs on Temporal.
        """
        own = self.chain if shape.kind == "chain" else self.graph
        retry = Retry(maximum_attempts=own.max_retries + 1)
        steps = tuple(
            replace(step, timeout=step.timeout or self.step_timeout, retry=step.retry or retry) for step in shape.steps
        )
        parallel = self.graph.parallel_execution if shape.parallel is None else shape.parallel
        return replace(
            shape,
            steps=steps,
            parallel=parallel,
            max_workers=(shape.max_workers or self.graph.max_workers) if parallel else 1,
            timeout=shape.timeout or (self.workflow.timeout if durable else own.timeout),
        )
