"""Two assets have one watcher: the events of one of them, which the other does not get any more, move both cursors.

Argument: a folder that is AIRFLOW_HOME. Prints the cursors as JSON, by asset.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

from airflow.models.asset import AssetModel
from airflow.models.asset_state_store import AssetStateStoreModel
from airflow.settings import get_session
from airflow.utils.db import initdb

from beluga_airflow.triggers.cursor import on_asset_event_emitted

WATCHER = "beluga/watcher/w"


def emit(name: str, version: int) -> None:
    payload = {"watcher": WATCHER, "version": version, "lost": None}
    event: Any = SimpleNamespace(
        asset=SimpleNamespace(name=name, uri=name),
        source_task_id=None,
        extra={"from_trigger": True, "payload": payload},
    )
    on_asset_event_emitted(event)


def main() -> None:
    initdb()
    session = get_session()()
    assets = {name: AssetModel(name=name, uri=name, group="asset") for name in ("first", "second", "other")}
    session.add_all(assets.values())
    session.flush()
    emit("first", 3)
    emit("second", 5)
    session.commit()
    names = {asset.id: name for name, asset in assets.items()}
    rows = session.query(AssetStateStoreModel).filter_by(key=WATCHER)
    print(json.dumps({names[row.asset_id]: json.loads(cast("str", row.value)) for row in rows}))


if __name__ == "__main__":
    main()
