"""Hooks: Airflow connections to models, Temporal and state stores."""
