"""The options of the model server's command line, for ``airflow beluga model-server`` and ``python -m``."""

from __future__ import annotations

from typing import Any

HELP = "Run a local server that simulates a model by rules"
DESCRIPTION = (
    "A local server that speaks OpenAI's chat completions and SIMULATES the model: it answers by rules, with "
    "log-probabilities, and has the troubles it is told to have (rate limits, resets, refusals, ...). A connection "
    "of provider 'simulated' with its base_url asks it. The form of the rules file: docs/model-server.md. Besides the "
    "API it serves GET /health, GET /calls, POST /failures and POST /reset."
)
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--host", {"default": "127.0.0.1", "help": "address to listen on (default: %(default)s)"}),
    ("--port", {"type": int, "default": 8400, "help": "0 takes a free one (default: %(default)s)"}),
    ("--rules", {"help": "YAML or JSON file: rules of the answers, what the endpoint can do, troubles"}),
    ("--latency", {"type": float, "default": 0.0, "help": "seconds before every answer"}),
    ("--api-key-env", {"metavar": "NAME", "help": "environment variable with the only key let in"}),
)
