"""Operators: flows, decisions and Temporal workflows as Airflow tasks."""
