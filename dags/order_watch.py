"""A change of state schedules a DAG: one order waits at the desk, the desk hears of it and lets it go."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import DAG, Asset, AssetWatcher, Param, task

from beluga_airflow.hooks.state import StateHook
from beluga_airflow.sensors.state import StateSensor
from beluga_airflow.triggers.state import StateChangeTrigger

WAITS, SEEN = {"state": "waits"}, {"state": "seen"}

with DAG(
    "order_desk",
    description="Puts an order on the desk and waits, without a worker, until it was seen",
    schedule=None,
    params={"order_id": Param("order-123", type="string", pattern="^[A-Za-z0-9_.-]{1,40}$")},
    default_args={"retries": 2, "retry_delay": timedelta(seconds=10)},
    tags=["beluga", "example"],
):

    @task
    def put(params: Any = None) -> None:
        StateHook().set(f"desk/{params['order_id']}", WAITS)

    put() >> StateSensor(task_id="is_seen", key="desk/{{ params.order_id }}", equals=SEEN, timeout=600)

desk = Asset("desk", watchers=[AssetWatcher(name="desk", trigger=StateChangeTrigger(prefix="desk/"))])

with DAG(
    "order_watch",
    description="Looks at the orders on the desk: scheduled by each change there",
    schedule=[desk],
    default_args={"retries": 2, "retry_delay": timedelta(seconds=10)},
    tags=["beluga", "example"],
):

    @task
    def look(triggering_asset_events: Any = None) -> list[str]:
        """See the orders that wait; what an event says may be old, the store is asked what is so now."""
        hook = StateHook()
        keys = {event.extra["payload"]["key"] for event in triggering_asset_events.get(desk, [])}
        waiting = sorted(key for key in keys if key and hook.get(key) == WAITS)
        for key in waiting:
            hook.set(key, SEEN)
        return waiting

    look()
