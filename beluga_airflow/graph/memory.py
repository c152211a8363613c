"""The conversation that a decision belongs to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta

from beluga_airflow.graph.parts import told
from beluga_airflow.graph.retry import is_duration, is_whole, seconds

__all__ = ["Memory"]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Lets a decision see the earlier turns of its conversation, and adds its own.

    Args:
        key: the field of the data that names the conversation, ``"customer_id"`` say; its value is a text or a whole
            number. The model sees it only where the decision reads it too.
        max_tokens: of earlier turns that go to the model, and that are kept, by an estimate that is rather too high.
            The newest go, whole ones only.
        name: decisions with the same name share their conversations; when left out they are of one step of one flow
            (an ``LLMDecisionOperator``: of one task of one DAG).
        ttl: seconds or a timedelta after its newest turn for which a conversation is kept; None: it stays.
    """

    key: str
    max_tokens: int = 2_000
    name: str | None = None
    ttl: float | timedelta | None = None

    def faults(self) -> list[str]:
        """What makes this memory meaningless, as clauses of a sentence; empty when it is sound."""
        found = []
        if not isinstance(self.key, str) or not self.key.strip():
            found.append(f"key is {told(self.key)}, it must name the field of the data that names the conversation")
        if not is_whole(self.max_tokens) or self.max_tokens < 1:
            found.append(f"max_tokens is {told(self.max_tokens)}, it must be a whole number, 1 or more")
        if self.name is not None and not (isinstance(self.name, str) and self.name.strip()):
            found.append(f"name is {told(self.name)}, it must be a text that is not empty")
        if self.ttl is not None and not (is_duration(self.ttl) and 0 < seconds(self.ttl) < math.inf):
            found.append(f"ttl is {told(self.ttl)}, it must be seconds or a timedelta, above 0 and finite")
        return found

    @property
    def ttl_seconds(self) -> float | None:
        """``ttl`` in seconds."""
        return None if self.ttl is None else seconds(self.ttl)
