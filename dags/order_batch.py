"""A day's orders, every day: read from a file, each run to its own end on Temporal, as one Airflow task."""

from __future__ import annotations

from datetime import timedelta

import pendulum
from airflow.sdk import DAG, CronDataIntervalTimetable, Param

from beluga_airflow.operators.batch import TemporalBatchOperator
from orders.flows import invoice_flow

# the day that is asked for; else the run's own, where the example file has it
DAY = """{{
    params.day or (
        data_interval_start | ds
        if data_interval_start is defined and dag.start_date <= data_interval_start <= dag.end_date
        else '2025-12-01'
    )
}}"""

with DAG(
    "order_batch",
    description="All orders of one day from a CSV file, on Temporal",
    schedule=CronDataIntervalTimetable("0 0 * * *", timezone="UTC"),
    # the days that the example file has; a backfill of them works like one of your own
    start_date=pendulum.datetime(2025, 11, 30, tz="UTC"),
    end_date=pendulum.datetime(2025, 12, 2, tz="UTC"),
    catchup=False,
    params={
        "source": Param(
            "orders.csv",
            type="string",
            minLength=1,
            description="A .csv or .csv.gz of invoice lines; a relative path starts at dags/data.",
        ),
        "day": Param(
            None,
            type=["null", "string"],
            pattern=r"^(\d{4}-\d{2}-\d{2}|all)$",
            description="YYYY-MM-DD, or 'all' for the whole file. Left empty: the day of the run's data interval, or "
            "2025-12-01 where that is none of the example file's days.",
        ),
    },
    # a retry goes on with the orders that have not ended
    default_args={"retries": 2, "retry_delay": timedelta(seconds=10)},
    max_active_runs=1,
    tags=["beluga", "example"],
):
    TemporalBatchOperator(
        task_id="process_orders",
        flow=invoice_flow,
        items="orders.source:orders_of_run",
        items_args={
            "source": "{{ params.source }}",
            "day": DAY,
        },
        key="InvoiceNo",
        max_in_flight=50,
    )
