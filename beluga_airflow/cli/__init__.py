"""``airflow beluga ...``, and the launcher of the whole system."""
