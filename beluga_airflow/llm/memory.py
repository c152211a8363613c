"""The earlier turns of a decision's conversation: in a state store, bounded in tokens, each of them once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from random import uniform
from typing import Any

from beluga_airflow.errors import InvalidInput, StateError
from beluga_airflow.graph import Identity, Memory
from beluga_airflow.graph.retry import is_whole
from beluga_airflow.llm.estimate import PER_MESSAGE, tokens
from beluga_airflow.llm.prompt import Exchange, exchanged, json_text
from beluga_airflow.state import StateStore, Versioned

__all__ = ["Conversation", "Turn"]

log = logging.getLogger(__name__)

KEY_LENGTH = 200
"""Characters that a conversation's key may have."""
LEFT_OUT = "(left out: too long)"
WIDEST = "0" * 16
"""The boundary that is estimated at most."""
BACK_OFF = 0.02
"""Seconds, at most, before a swap that somebody else was faster with is tried again."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One decision of a conversation.

    Args:
        key: the idempotency key of its step: a conversation has one turn of it.
        generation: that asked.
        run: whose generation it is.
        asked: what the model saw of the case, as JSON: question and data.
        answered: answer and reason, as JSON; where no model did, by whom instead of the reason.
    """

    key: str
    generation: int
    run: str
    asked: Mapping[str, Any]
    answered: Mapping[str, Any]

    @property
    def exchange(self) -> Exchange:
        """What of it goes to the model."""
        return Exchange(asked=json_text(self.asked), answered=json_text(self.answered))

    @property
    def size(self) -> int:
        """Tokens of its messages."""
        return sum(PER_MESSAGE + tokens(message["content"]) for message in exchanged(self.exchange, WIDEST))

    def within(self, max_tokens: int) -> Turn | None:
        """This turn, without its data where it is too large by itself; None: too large all the same."""
        for turn in (self, replace(self, asked={**self.asked, "data": LEFT_OUT})):
            if turn.size <= max_tokens:
                return turn
        return None


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """One conversation, and whose turn it is now.

    Args:
        state: where it is kept.
        entry: the store's key.
        memory: its bounds.
        key, generation, run: of the turn, see ``Turn``.
    """

    state: StateStore
    entry: str
    memory: Memory
    key: str
    generation: int
    run: str

    @classmethod
    def of(
        cls, memory: Memory, data: Mapping[str, Any], *, flow: str, step: str, identity: Identity, state: StateStore
    ) -> Conversation:
        """The conversation that the data names, at the turn of this step of this run.

        Raises:
            InvalidInput: the data does not name one.
        """
        names = (flow, step) if memory.name is None else (memory.name,)
        key = _conversation_key(data[memory.key], step, memory.key)
        return cls(
            state=state,
            entry=f"beluga/memory/{Identity.of(*names).key(Identity.of(key).scope)}",
            memory=memory,
            key=identity.key(step),
            generation=identity.generation,
            run=identity.run,
        )

    async def earlier(self) -> list[Exchange]:
        """The newest turns that fit, oldest first: those before this one, where it is asked anew.

        Raises:
            StateUnavailable: the store cannot be reached.
            StateError: what is there is no conversation.
        """
        kept, _ = self._read(await self.state.get_versioned(self.entry))
        turns = takewhile(lambda turn: turn.key != self.key, kept)
        return [turn.exchange for turn in _fitting([*turns], self.memory.max_tokens)]

    async def add(self, question: str, data: Mapping[str, Any], answered: Mapping[str, Any]) -> None:
        """Add this turn, or put it into the place of the one that an earlier generation left; once, however often.

        Raises:
            StateUnavailable: the store cannot be reached; it may be there all the same.
        """
        asked = {"data": dict(data), "question": question}
        turn = Turn(key=self.key, generation=self.generation, run=self.run, asked=asked, answered=answered)
        while True:
            if await self._swapped(turn):
                return
            await asyncio.sleep(uniform(0, BACK_OFF))  # noqa: S311  # no secret: so that not all come at once again

    async def _swapped(self, turn: Turn) -> bool:
        found = await self.state.get_versioned(self.entry)
        kept, bound = self._read(found)
        # decisions that share it may have different bounds: it is kept for the one that sees most
        bound = max(self.memory.max_tokens, bound)
        turns = _fitting(_placed(kept, turn), bound)
        value = {"max_tokens": bound, "turns": [asdict(turn) for turn in turns]}
        if found and value == found.value:
            return True
        version = found.version if found else None
        ttl = self.memory.ttl_seconds
        return await self.state.compare_and_swap(self.entry, value, version=version, ttl=ttl) is not None

    def _read(self, found: Versioned | None) -> tuple[list[Turn], int]:
        """The turns, and the most tokens they may have.

        Raises:
            StateError: it is not ours, or a later version's: written over, it would be lost.
        """
        if found is None:
            return [], 0
        try:
            turns, bound = [Turn(**turn) for turn in found.value["turns"]], found.value["max_tokens"]
        except (TypeError, KeyError):
            turns, bound = [], None
        if is_whole(bound) and all(isinstance(part, dict) for turn in turns for part in (turn.asked, turn.answered)):
            return turns, bound
        raise StateError(
            f"{self.entry!r} in {self.state.url} is no conversation that this version can read: deploy the version "
            "that wrote it, or delete it and begin anew"
        )


def _conversation_key(value: Any, step: str, field: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        problem = f"is {'None' if value is None else f'a {type(value).__name__}'}"
    elif str(value).strip() in ("", "None"):  # a template renders what is missing as "None"
        problem = "is empty"
    elif len(str(value)) > KEY_LENGTH:
        problem = f"has more than {KEY_LENGTH} characters"
    else:
        return str(value)
    raise InvalidInput(
        f"step {step!r} finds its conversation by {field!r}, which {problem}; it must be a text or a whole number that "
        "names one, for instance a customer's number"
    )


def _placed(turns: list[Turn], turn: Turn) -> list[Turn]:
    """The turns with this one: in the place of the one with its key, else the newest."""
    for place, other in enumerate(turns):
        if other.key == turn.key:
            is_late = other.run == turn.run and other.generation > turn.generation
            return turns if is_late else [*turns[:place], turn, *turns[place + 1 :]]
    return [*turns, turn]


def _fitting(turns: Iterable[Turn], max_tokens: int) -> list[Turn]:
    """The newest turns that fit together, in their order."""
    kept: list[Turn] = []
    room = max_tokens
    for turn in reversed([*turns]):
        fitting = turn.within(max_tokens)
        if fitting is None:
            log.info("a turn of a conversation is left out: by itself it has more than %d tokens", max_tokens)
            continue
        room -= fitting.size
        if room < 0:
            break
        kept.append(fitting)
    return kept[::-1]
