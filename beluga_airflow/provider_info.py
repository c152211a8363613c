"""What Airflow learns of this provider while it reads its configuration: imports nothing."""

from __future__ import annotations

from typing import Any

__all__ = ["get_provider_info"]


def get_provider_info() -> dict[str, Any]:
    """Name, connection types, modules and commands, as Airflow's provider schema has them."""
    name = "Beluga"
    return {
        "package-name": "beluga-airflow",
        "name": name,
        "description": "AI decisions and durable workflows: flows in one task and on Temporal.",
        "integrations": [{"integration-name": name, "external-doc-url": "", "tags": ["service", "ai"]}],
        "operators": [
            {
                "integration-name": name,
                "python-modules": [
                    "beluga_airflow.operators.flow",
                    "beluga_airflow.operators.decision",
                    "beluga_airflow.operators.branch",
                    "beluga_airflow.operators.temporal",
                    "beluga_airflow.operators.batch",
                ],
            }
        ],
        "hooks": [
            {
                "integration-name": name,
                "python-modules": [
                    "beluga_airflow.hooks.llm",
                    "beluga_airflow.hooks.temporal",
                    "beluga_airflow.hooks.state",
                ],
            }
        ],
        "sensors": [{"integration-name": name, "python-modules": ["beluga_airflow.sensors.state"]}],
        "triggers": [
            {
                "integration-name": name,
                "python-modules": ["beluga_airflow.triggers.temporal", "beluga_airflow.triggers.state"],
            }
        ],
        "task-decorators": [
            {"name": name, "class-name": f"beluga_airflow.operators.decorators.{name}_task"}
            for name in ("llm_decision", "llm_branch_decision")
        ],
        "extra-links": ["beluga_airflow.operators.temporal.TemporalRunLink"],
        "cli": ["beluga_airflow.cli.commands.get_commands"],
        "connection-types": [_llm(), _temporal(), _state()],
        "config": {
            "beluga": {
                "description": "Flows and decisions.",
                "options": {
                    "config_file": {
                        "description": (
                            "A YAML file with the settings that hold where neither an argument nor a connection says "
                            "otherwise; a relative path is one under AIRFLOW_HOME. Read whenever a flow starts. "
                            "``airflow beluga config`` shows what is in force."
                        ),
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "/etc/airflow/beluga.yaml",
                        "default": None,
                    },
                },
            },
        },
    }


def _llm() -> dict[str, Any]:
    return {
        "connection-type": "beluga_llm",
        "hook-class-name": "beluga_airflow.hooks.llm.LLMHook",
        "hook-name": "Beluga LLM",
        "ui-field-behaviour": {
            "hidden-fields": ["host", "port", "schema", "login", "extra"],
            "relabeling": {"password": "API key"},
        },
        "conn-fields": {
            "provider": _text("Provider", "openai, azure, anthropic, gemini, groq, mistral, ollama, vllm, ..."),
            "model": _text("Model", "as configured when left out, or gpt-4o"),
            "base_url": _text("Base URL", "for an endpoint that is not the provider's own"),
            "timeout": {
                "label": "Timeout (seconds)",
                "description": "of one call; as configured when left out, or 30",
                "schema": {"type": ["number", "null"], "exclusiveMinimum": 0},
            },
            "structured_output": _words("Structured output", "schema", "text", "how answers are asked for"),
            "logprobs": _words("Log-probabilities", "on", "off", "of choices, which confidence is made of"),
            "failure_threshold": _whole("Breaker: failures", "in a row, of all workers, after which it is left alone"),
            "recovery_timeout": {
                "label": "Breaker: seconds",
                "description": "that it is left alone, before one call tries again",
                "schema": {"type": ["number", "null"], "exclusiveMinimum": 0},
            },
            "requests_per_minute": _whole("Requests a minute", "of all workers together"),
            "tokens_per_minute": _whole("Tokens a minute", "of all workers together"),
            "concurrent_calls": _whole("Calls at once", "of all workers together"),
            "max_wait": {
                "label": "Longest wait (seconds)",
                "description": "of a call that comes too early; 30 when left out",
                "schema": {"type": ["number", "null"], "exclusiveMinimum": 0},
            },
            "tokens_per_day": _whole("Tokens a day", "in UTC, of all workers together; then it is not asked any more"),
            "dollars_per_day": {
                "label": "Dollars a day",
                "description": "in UTC, of all workers together; then it is not asked any more",
                "schema": {"type": ["number", "null"], "exclusiveMinimum": 0},
            },
        },
    }


def _temporal() -> dict[str, Any]:
    return {
        "connection-type": "temporal",
        "hook-class-name": "beluga_airflow.hooks.temporal.TemporalHook",
        "hook-name": "Temporal",
        "ui-field-behaviour": {
            "hidden-fields": ["schema", "login", "extra"],
            "relabeling": {"password": "API key"},
            "placeholders": {"host": "localhost", "port": "7233"},
        },
        "conn-fields": {
            "namespace": _text("Namespace", "as configured when left out, or default"),
            "task_queue": _text("Task queue", "as configured when left out, or beluga-workflows"),
            "tls": {"label": "TLS", "schema": {"type": ["boolean", "null"]}},
            "ui_url": _text("Web UI", "address of Temporal's web UI, for links from tasks"),
        },
    }


def _state() -> dict[str, Any]:
    return {
        "connection-type": "beluga_state",
        "hook-class-name": "beluga_airflow.hooks.state.StateHook",
        "hook-name": "Beluga state store",
        "ui-field-behaviour": {"hidden-fields": ["host", "port", "schema", "login", "password", "extra"]},
        "conn-fields": {
            "url": {
                "label": "URL",
                "description": "sqlite:////path/to/state.db, redis://host:6379/0, postgresql://user:password@host/database",
                # it may come to hold a password
                "schema": {"type": ["string", "null"], "format": "password"},
            },
        },
    }


def _whole(label: str, description: str) -> dict[str, Any]:
    return {"label": label, "description": description, "schema": {"type": ["integer", "null"], "minimum": 1}}


def _words(label: str, yes: str, no: str, description: str) -> dict[str, Any]:
    words = ["auto", yes, no]
    return {
        "label": label,
        "description": f"{description}: {', '.join(words)}; auto (when left out): until the endpoint refuses it",
        "schema": {"type": ["string", "null"], "enum": [*words, None]},
    }


def _text(label: str, description: str) -> dict[str, Any]:
    return {"label": label, "description": description, "schema": {"type": ["string", "null"]}}
