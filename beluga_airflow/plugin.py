"""What Airflow loads of us in each of its processes."""

from __future__ import annotations

from airflow.plugins_manager import AirflowPlugin

from beluga_airflow.triggers import cursor

__all__ = ["BelugaPlugin"]


class BelugaPlugin(AirflowPlugin):
    """Listens, in the triggerer, for the events of watched state: see ``beluga_airflow.triggers.cursor``."""

    name = "beluga"
    listeners = [cursor]  # noqa: RUF012  # Airflow declares it for instances
