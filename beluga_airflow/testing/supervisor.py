"""Airflow's supervisor and API server for the tasks of one test, in memory.

A task of Airflow never reaches the metadata database: it asks its supervisor, which asks the API server. This answers
in their place, as the two of Airflow 3.3 do: an XCom that is not there is null, an unknown connection is an error that
the hook sees, task state belongs to (DAG, run, task, map index) and outlives attempts, a value that cannot travel is
refused.
"""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from uuid import UUID

from airflow.sdk import Connection
from airflow.sdk.api.datamodels._generated import ConnectionResponse, XComResponse
from airflow.sdk.exceptions import AirflowRuntimeError, ErrorType
from airflow.sdk.execution_time import comms
from airflow.sdk.execution_time.supervisor import set_supervisor_comms
from pydantic import BaseModel, JsonValue

__all__ = ["ConnectionSpec", "InMemorySupervisor", "TaskKey"]

ConnectionSpec = Mapping[str, Any] | str | Connection
"""A connection as its JSON form (a mapping), its URI or JSON text, or the object itself."""

#: what a trigger may not ask: the triggerer does not know these messages, and a real trigger would wait for ever
_UNKNOWN_TO_TRIGGERERS = (
    comms.GetTaskStateStore,
    comms.SetTaskStateStore,
    comms.DeleteTaskStateStore,
    comms.ClearTaskStateStore,
    comms.GetXComCount,
    comms.GetXComSequenceItem,
    comms.GetXComSequenceSlice,
    comms.CreateHITLDetailPayload,
)
_NEEDS_NO_ANSWER = (
    comms.AwaitInputTask,
    comms.DeferTask,
    comms.MaskSecret,
    comms.RescheduleTask,
    comms.RetryTask,
    comms.SetRenderedMapIndex,
    comms.SkipDownstreamTasks,
    comms.SucceedTask,
    comms.TaskState,
)

in_trigger: ContextVar[bool] = ContextVar("in_trigger", default=False)
"""Whether the code that runs now is a trigger's."""


class TaskKey(NamedTuple):
    """What XComs and task state belong to; every attempt of a task has the same."""

    dag_id: str
    run_id: str
    task_id: str
    map_index: int = -1


class InMemorySupervisor:
    """Answers what tasks and triggers ask while `installed()`; safe for several at a time, from any thread.

    Attributes:
        connections: by connection id; environment variables ``AIRFLOW_CONN_<ID>`` win, as on a worker.
        variables: Airflow variables by key, as text.
        forms: the human-in-the-loop form of a task; as in Airflow, the first one stays.
    """

    def __init__(self) -> None:
        self.connections: dict[str, ConnectionSpec] = {}
        self.variables: dict[str, str | None] = {}
        self.forms: dict[TaskKey, comms.CreateHITLDetailPayload] = {}
        # JSON text, so that nobody shares an object with what is stored
        self._xcoms: dict[tuple[TaskKey, str], str] = {}
        self._task_states: defaultdict[TaskKey, dict[str, str]] = defaultdict(dict)
        self._task_of: dict[UUID, TaskKey] = {}
        self._rendered: dict[int, dict[str, JsonValue]] = {}
        self._asking: defaultdict[int, int] = defaultdict(int)
        self._lock = threading.Lock()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Make this process look to Airflow like a task's: its hooks, XComs and states come here."""
        with set_supervisor_comms(self), _signal_usable_in_threads():
            yield

    def register(self, attempt: UUID, task: TaskKey) -> None:
        """An attempt of `task` begins, under an id of its own."""
        self._task_of[attempt] = task

    def knows(self, task: TaskKey) -> bool:
        """Whether an attempt of `task` ever began."""
        return task in self._task_of.values()

    def put_xcom(self, task: TaskKey, key: str, value: JsonValue) -> None:
        """Store an XCom; `value` is in the form that Airflow stores: JSON."""
        self._xcoms[task, key] = json.dumps(value, allow_nan=False)

    def xcoms_of(self, task: TaskKey) -> dict[str, Any]:
        """The XComs of `task` by key, as they are stored."""
        return {key: json.loads(text) for (owner, key), text in self._xcoms.copy().items() if owner == task}

    def task_state_of(self, task: TaskKey) -> dict[str, JsonValue]:
        """What `task` keeps in its task state store."""
        return {key: json.loads(text) for key, text in self._task_states[task].copy().items()}

    def clear_task_state(self, task: TaskKey) -> None:
        """Forget what `task` keeps in its task state store."""
        self._task_states[task].clear()

    def take_rendered_fields(self) -> dict[str, JsonValue]:
        """The rendered fields that the task which just ran in this thread reported."""
        return self._rendered.pop(threading.get_ident(), {})

    def send(self, msg: BaseModel) -> BaseModel | None:
        """Answer a request of a task or a trigger.

        Raises:
            AirflowRuntimeError: it cannot be answered; the detail says why.
            DeadlockImminentError: asked on an event loop while `asend` is under way there, as Airflow raises it.
        """
        if self._asking[threading.get_ident()] and _on_event_loop() and not in_trigger.get():
            raise comms.DeadlockImminentError(msg)
        return self._exchange(msg)

    async def asend(self, msg: BaseModel) -> BaseModel | None:
        """Like `send`, from a coroutine."""
        thread = threading.get_ident()
        self._asking[thread] += 1
        try:
            await asyncio.sleep(0)  # others run meanwhile, as with a real socket
            return self._exchange(msg)
        finally:
            self._asking[thread] -= 1

    def _exchange(self, msg: BaseModel) -> BaseModel | None:
        try:
            # Airflow's own framing refuses what cannot travel to the supervisor
            comms._RequestFrame(id=0, body=msg.model_dump()).as_bytes()
            with self._lock:
                return self._answer(msg)
        except Exception as error:
            detail = {"status_code": None, "message": str(error), "exception_type": type(error).__name__}
            raise AirflowRuntimeError(comms.ErrorResponse(error=ErrorType.API_SERVER_ERROR, detail=detail)) from error

    def _answer(self, msg: BaseModel) -> BaseModel | None:
        if in_trigger.get() and isinstance(msg, _UNKNOWN_TO_TRIGGERERS):
            raise NotImplementedError(f"the triggerer of Airflow does not answer {type(msg).__name__}")
        match msg:
            case _ if isinstance(msg, _NEEDS_NO_ANSWER):
                return None
            case comms.GetConnection() | comms.GetVariable() | comms.GetVariableKeys():
                return self._secret(msg)
            case comms.PutVariable():
                self.variables[msg.key] = msg.value
                return None
            case comms.DeleteVariable():
                self.variables.pop(msg.key, None)
                return comms.OKResponse(ok=True)
            case comms.SetRenderedFields():
                self._rendered[threading.get_ident()] = msg.rendered_fields
                return None
            case comms.ValidateInletsAndOutlets():
                return comms.InactiveAssetsResult(inactive_assets=[])
            case comms.GetPrevSuccessfulDagRun():
                return comms.PrevSuccessfulDagRunResult()
            case comms.CreateHITLDetailPayload():
                form = self.forms.setdefault(self._task_of[msg.ti_id], msg)
                return comms.HITLDetailRequestResult(**form.model_dump(exclude={"type"}))
            case (
                comms.GetTaskStateStore()
                | comms.SetTaskStateStore()
                | comms.DeleteTaskStateStore()
                | comms.ClearTaskStateStore()
            ):
                return self._task_state(msg)
            case _:
                return self._xcom(msg)

    def _secret(self, msg: BaseModel) -> BaseModel:
        match msg:
            case comms.GetConnection(conn_id=conn_id) if conn_id in self.connections:
                return comms.ConnectionResult.from_conn_response(_connection(conn_id, self.connections[conn_id]))
            case comms.GetConnection(conn_id=conn_id):
                return comms.ErrorResponse(error=ErrorType.CONNECTION_NOT_FOUND, detail={"conn_id": conn_id})
            case comms.GetVariable(key=key) if key in self.variables:
                return comms.VariableResult(key=key, value=self.variables[key])
            case comms.GetVariable(key=key):
                return comms.ErrorResponse(error=ErrorType.VARIABLE_NOT_FOUND, detail={"key": key})
            case comms.GetVariableKeys():
                keys = sorted(key for key in self.variables if key.startswith(msg.prefix or ""))
                page = keys[msg.offset : msg.offset + msg.limit]
                return comms.VariableKeysResult(keys=page, total_entries=len(keys))
        raise _unanswered(msg)

    def _task_state(self, msg: BaseModel) -> BaseModel:
        match msg:
            case comms.GetTaskStateStore():
                text = self._task_states[self._task_of[msg.ti_id]].get(msg.key)
                if text is None:
                    return comms.ErrorResponse(error=ErrorType.TASK_STORE_NOT_FOUND, detail={"key": msg.key})
                return comms.TaskStateStoreResult(value=json.loads(text))
            case comms.SetTaskStateStore():
                text = json.dumps(msg.value, allow_nan=False)
                self._task_states[self._task_of[msg.ti_id]][msg.key] = text
            case comms.DeleteTaskStateStore():
                self._task_states[self._task_of[msg.ti_id]].pop(msg.key, None)
            case comms.ClearTaskStateStore():
                self.clear_task_state(self._task_of[msg.ti_id])
        return comms.OKResponse(ok=True)

    def _xcom(self, msg: BaseModel) -> BaseModel | None:
        match msg:
            case comms.SetXCom():
                self.put_xcom(_owner(msg), msg.key, msg.value)
                return None
            case comms.DeleteXCom():
                self._xcoms.pop((_owner(msg), msg.key), None)
                return None
            case comms.GetXCom():
                # Airflow answers null where there is none
                value = json.loads(self._xcoms.get((_owner(msg), msg.key), "null"))
                return comms.XComResult.from_xcom_response(XComResponse(key=msg.key, value=value))
            case comms.GetXComCount():
                return comms.XComCountResponse(len=len(self._mapped_xcoms(msg)))
            case comms.GetXComSequenceSlice():
                chosen = self._mapped_xcoms(msg)[msg.start : msg.stop : msg.step]
                return comms.XComSequenceSliceResult(root=chosen)
            case comms.GetXComSequenceItem():
                values = self._mapped_xcoms(msg)
                if not -len(values) <= msg.offset < len(values):
                    return comms.ErrorResponse(error=ErrorType.XCOM_NOT_FOUND, detail=msg.model_dump(exclude={"type"}))
                return comms.XComSequenceIndexResult(root=values[msg.offset])
        raise _unanswered(msg)

    def _mapped_xcoms(
        self, msg: comms.GetXComCount | comms.GetXComSequenceItem | comms.GetXComSequenceSlice
    ) -> list[JsonValue]:
        """The values under one key of a task, by map index."""
        wanted = (msg.dag_id, msg.run_id, msg.task_id)
        found = sorted(
            (task.map_index, text) for (task, key), text in self._xcoms.items() if key == msg.key and task[:3] == wanted
        )
        return [json.loads(text) for _, text in found]


def _owner(msg: comms.GetXCom | comms.SetXCom | comms.DeleteXCom) -> TaskKey:
    return TaskKey(msg.dag_id, msg.run_id, msg.task_id, -1 if msg.map_index is None else max(msg.map_index, -1))


def _unanswered(msg: BaseModel) -> NotImplementedError:
    return NotImplementedError(
        f"the in-memory supervisor does not answer {type(msg).__name__}; test this against Airflow, by dag.test()"
    )


def _connection(conn_id: str, spec: ConnectionSpec) -> ConnectionResponse:
    if isinstance(spec, Mapping):
        spec = json.dumps(dict(spec))
    if isinstance(spec, str):
        reader = Connection.from_json if spec.lstrip().startswith("{") else Connection.from_uri
        spec = reader(spec, conn_id=conn_id)
    # the field of the schema has an alias, which only validation accepts
    return ConnectionResponse.model_validate(
        {
            "conn_id": conn_id,
            "conn_type": spec.conn_type or "",
            "host": spec.host,
            "schema": spec.schema,
            "login": spec.login,
            "password": spec.password,
            "port": spec.port,
            "extra": spec.extra,
        }
    )


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


@contextmanager
def _signal_usable_in_threads() -> Iterator[None]:
    """Let Airflow's task runner run in a thread: it handles SIGTERM, which Python allows in the main thread only."""
    original = signal.signal

    def set_handler(signum: int, handler: Any) -> Any:
        if signum == signal.SIGTERM and threading.current_thread() is not threading.main_thread():
            return signal.getsignal(signum)
        return original(signum, handler)

    signal.signal = set_handler  # type: ignore[assignment]  # the same but for the types of the handler
    try:
        yield
    finally:
        signal.signal = original
