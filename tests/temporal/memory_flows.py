"""A flow that talks: importable, as a worker needs it."""

from __future__ import annotations

from beluga_airflow import Chain, Decision, Memory, Retry

talk = Chain("talk", retry=Retry(maximum_attempts=3, initial_interval=0.01)).add_step(
    "answer",
    Decision("Which?", choices=["a", "b"], reads=["text"], memory=Memory(key="customer", max_tokens=20_000)),
)
