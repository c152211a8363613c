"""Finding a flow or a decision by its import path, and the path of a flow."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from beluga_airflow.errors import BelugaError, FlowNotFound
from beluga_airflow.graph.decision import Decision
from beluga_airflow.graph.flow import Flow

__all__ = ["load_decision", "load_flow", "path_of"]


def load_flow(path: str) -> Flow:
    """The flow at ``module:name``, checked.

    Raises:
        FlowNotFound: the path is malformed, the module cannot be imported here, or has no such flow.
        InvalidFlow: it is there, and cannot run.
    """
    flow = _found(path, Flow, "flow", "a Chain or Graph")
    assert isinstance(flow, Flow)
    flow.check()
    return flow


def load_decision(path: str) -> Decision:
    """The decision at ``module:name``, as it is.

    Raises:
        FlowNotFound: the path is malformed, the module cannot be imported here, or has no such decision.
    """
    decision = _found(path, Decision, "decision", "a Decision")
    assert isinstance(decision, Decision)
    return decision


def _found(path: str, kind: type, what: str, wanted: str) -> Any:
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise FlowNotFound(f"{path!r} is not the import path of a {what}; write it as 'package.module:name'")
    try:
        module = importlib.import_module(module_name)
    except BelugaError:
        raise
    except (Exception, SystemExit) as error:  # a module's code may raise anything
        raise FlowNotFound(
            f"{what} {path!r} cannot be imported in this process: {type(error).__name__}: {error}; mend or install its "
            "package here, or put its folder on the Python path (a worker: --import)"
        ) from error
    value = getattr(module, name, None)
    if not isinstance(value, kind):
        found = "nothing of that name" if value is None else f"a {type(value).__name__}"
        raise FlowNotFound(f"{what} {path!r}: module {module_name!r} has {found} where {wanted} is wanted")
    return value


def path_of(flow: Flow) -> str:
    """The import path under which any process finds this flow.

    Raises:
        FlowNotFound: it is not a module-level name of an importable module.
    """
    # where it was made first; a function may have made it for another module
    for home in (flow.module, *sys.modules):
        if home == "__main__" or home.startswith("unusual_prefix_"):
            continue  # a script, or a DAG file as Airflow loads it: nobody else finds those
        for name, value in list(getattr(sys.modules.get(home), "__dict__", {}).items()):
            if value is flow:
                return f"{home}:{name}"
    raise FlowNotFound(
        f"flow {flow.name!r}, made in {flow.module!r}, cannot be found by a worker. Move it to the top level of a "
        "module that Airflow and the worker can both import, beside the DAG file say, and pass "
        "flow='that_module:its_name' or import it"
    )
