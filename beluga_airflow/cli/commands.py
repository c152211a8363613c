"""The commands that this provider adds to ``airflow beluga``; loads nothing until one is run."""

from __future__ import annotations

import argparse

from airflow.cli.cli_config import ActionCommand, Arg, CLICommand, GroupCommand, lazy_load_command

__all__ = ["get_commands"]


def get_commands() -> list[CLICommand]:
    """``airflow beluga ...``."""
    return [
        GroupCommand(
            name="beluga",
            help="Flows, decisions and their workers",
            subcommands=[
                ActionCommand(
                    name="worker",
                    help="Run flows from Temporal until told to stop",
                    func=lazy_load_command("beluga_airflow.cli.worker.worker"),
                    args=(
                        Arg(("--task-queue",), help="whose work to take; the connection's when left out"),
                        Arg(("--concurrency",), type=int, default=100, help="steps and items at once (100)"),
                        Arg(
                            ("--import",),
                            dest="imports",
                            action="append",
                            default=[],
                            help="a module with flows, imported at the start so that a fault shows there; repeatable",
                        ),
                        Arg(("--temporal-conn-id",), default="temporal_default", help="the server's connection"),
                    ),
                ),
                ActionCommand(
                    name="show",
                    help="Draw a flow in the terminal",
                    func=lazy_load_command("beluga_airflow.cli.show.show"),
                    args=(
                        Arg(("flow",), help="its import path: package.module:name"),
                        Arg(("--mermaid",), action="store_true", help="print it as a Mermaid flowchart instead"),
                    ),
                ),
                ActionCommand(
                    name="model-server",
                    help="Run a local server that simulates a model by rules",
                    func=lazy_load_command("beluga_airflow.cli.model_server.model_server"),
                    args=(Arg(("arguments",), nargs=argparse.REMAINDER, help="--host --port --rules --latency"),),
                ),
            ],
        )
    ]
