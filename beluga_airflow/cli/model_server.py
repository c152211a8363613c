"""``airflow beluga model-server``."""

from __future__ import annotations

import sys
from argparse import Namespace

from beluga_airflow.llm.model_server import run

__all__ = ["model_server"]


def model_server(arguments: Namespace) -> None:
    """Serve until told to stop."""
    sys.exit(run(arguments))
