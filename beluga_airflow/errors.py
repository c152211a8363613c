"""The error tree, drawn once.

    BelugaError
    ├── InvalidFlow            a definition is wrong: refused when it is checked, never retried
    ├── InvalidSetting         a connection, a setting or an argument is wrong: never retried
    │   └── FlowNotFound       an import path leads to no flow
    ├── InvalidInput           the data is wrong: never retried, anywhere
    │   ├── MissingKey         (also a KeyError) a step or a decision reads a key that nobody provided
    │   └── MergeConflict      parallel branches set one key to different values
    ├── InvalidOutput          a step returned what is not JSON: never retried
    ├── StepTimeout            one attempt took longer than the step's timeout
    ├── StepExited             a step called sys.exit()
    ├── ModelError             a language model gave no usable answer
    │   ├── ModelUnavailable   overloaded, timed out, 5xx, connection lost: worth another try
    │   ├── ModelRefused       key refused, quota used up, request refused: never retried
    │   └── Undecided          the model answered, but outside what was asked: never retried
    ├── StateError             a state store could not do what it was asked
    │   ├── StateUnavailable   it is not there now: worth another try
    │   └── HistoryLost        a reader comes too late: changes it has not seen are not kept any more
    ├── NotNow                 a guard of ours lets nothing through now: worth another try
    │   ├── BreakerOpen        what it guards has failed too often
    │   ├── BudgetSpent        its tokens or dollars are used up: never retried
    │   └── LimitReached       its bound is used up, and there is no time to wait
    └── TemporalError          Temporal refused or lost what it was asked
        └── TemporalUnavailable  no server answers: worth another try

Foreign errors cross into this tree at one place per library: ``llm/client.py`` (openai), ``state/sqlite.py``
(sqlite3), ``state/redis.py`` (redis), ``state/postgres.py`` (psycopg), ``temporal/client.py`` (temporalio).
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BelugaError",
    "BreakerOpen",
    "BudgetSpent",
    "FlowNotFound",
    "HistoryLost",
    "InvalidFlow",
    "InvalidInput",
    "InvalidOutput",
    "InvalidSetting",
    "LimitReached",
    "MergeConflict",
    "MissingKey",
    "ModelError",
    "ModelRefused",
    "ModelUnavailable",
    "NotNow",
    "StateError",
    "StateUnavailable",
    "StepExited",
    "StepTimeout",
    "TemporalError",
    "TemporalUnavailable",
    "Undecided",
]


class BelugaError(Exception):
    """Base of every error of this package.

    ``retryable`` says whether the same attempt may succeed later; a step's ``Retry`` obeys it.
    """

    retryable: ClassVar[bool] = False


class InvalidFlow(BelugaError):
    """A flow, or a part of one, that cannot mean anything. Raised when the flow is checked."""


class InvalidSetting(BelugaError):
    """A connection, a setting or an operator's argument that cannot be used."""


class FlowNotFound(InvalidSetting):
    """An import path that leads to no flow in this process."""


class InvalidInput(BelugaError):
    """The data is wrong, so that no other attempt can succeed. Steps raise it; it is never retried."""


class MissingKey(InvalidInput, KeyError):
    """A step or a decision reads a key that neither the input nor an earlier step provided."""

    def __str__(self) -> str:
        # KeyError would print the repr of the message
        return str(self.args[0])


class MergeConflict(InvalidInput):
    """Two parallel branches set one key to different values and no reducer is given for it."""


class InvalidOutput(BelugaError):
    """A step returned something that cannot be JSON."""


class StepTimeout(BelugaError):
    """One attempt of a step took longer than its timeout."""

    retryable = True


class StepExited(BelugaError):
    """A step called ``sys.exit()``, which must not end the process of a worker."""


class ModelError(BelugaError):
    """A language model gave no usable answer."""


class ModelUnavailable(ModelError):
    """The model's endpoint cannot answer now.

    Args:
        message: what happened, where, and what to do.
        retry_after: seconds that the server asked to wait, or None.
        may_cost: whether it may have answered, and be paid, though no answer came here.
    """

    retryable = True

    def __init__(self, message: str, *, retry_after: float | None = None, may_cost: bool = False) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.may_cost = may_cost


class ModelRefused(ModelError):
    """The endpoint refused the key, the account or the request. Asking again cannot help."""


class Undecided(ModelError):
    """A decision came to no answer inside its choices, and nothing says what then."""


class StateError(BelugaError):
    """A state store could not do what it was asked."""


class StateUnavailable(StateError):
    """The state store cannot be reached now."""

    retryable = True


class HistoryLost(StateError):
    """A state store does not keep all changes any more that a reader has not seen.

    Args:
        message: which, of which store.
        after: the version of the last change that was seen.
        kept_from: the version of the first change that is still kept.
    """

    def __init__(self, message: str, *, after: int = 0, kept_from: int = 0) -> None:
        super().__init__(message)
        self.after = after
        self.kept_from = kept_from


class NotNow(BelugaError):
    """A guard of ours lets nothing through now. What it guards was not called.

    Args:
        message: which guard, why, and what to do.
        retry_after: seconds after which it may let something through, or None.
    """

    retryable = True

    def __init__(self, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BreakerOpen(NotNow):
    """What a circuit breaker guards has failed too often, and is left alone for a while."""


class BudgetSpent(NotNow):
    """A budget has too little left for another call, and no retry soon can help.

    Args:
        message: which budget, how much of it is spent, and when it begins anew.
        retry_after: seconds after which it begins anew, or None.
        connection: whose budget it is, where it is a connection's own: another connection may do.
    """

    retryable = False

    def __init__(self, message: str, *, retry_after: float | None = None, connection: str | None = None) -> None:
        super().__init__(message, retry_after=retry_after)
        self.connection = connection


class LimitReached(NotNow):
    """A rate limit is used up, and the caller cannot wait for its next place."""


class TemporalError(BelugaError):
    """Temporal refused what it was asked, or does not know it."""


class TemporalUnavailable(TemporalError):
    """No Temporal server answers at the address."""

    retryable = True
