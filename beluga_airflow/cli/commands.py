"""The commands that this provider adds to ``airflow beluga``; loads nothing until one is run."""

from __future__ import annotations

from airflow.cli.cli_config import ActionCommand, Arg, CLICommand, GroupCommand, lazy_load_command, positive_int

from beluga_airflow.llm import model_options

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
                    name="status",
                    help="Show how flow runs, circuit breakers and rate limits stand",
                    func=lazy_load_command("beluga_airflow.cli.status.status"),
                    args=(
                        Arg(("--watch",), action="store_true", help="keep it live until Ctrl-C"),
                        Arg(("--flow",), help="only runs of this flow"),
                        Arg(("--limit",), type=positive_int(allow_zero=False), default=50, help="how many runs (50)"),
                        Arg(("--state-conn-id",), default="beluga_state_default", help="the store's connection"),
                        Arg(("--temporal-conn-id",), default="temporal_default", help="the server's connection"),
                    ),
                ),
                ActionCommand(
                    name="config",
                    help="Print the settings in force, and where each came from",
                    func=lazy_load_command("beluga_airflow.cli.config.config"),
                    args=(Arg(("--json",), action="store_true", help="print them as JSON"),),
                ),
                ActionCommand(
                    name="model-server",
                    help=model_options.HELP,
                    description=model_options.DESCRIPTION,
                    func=lazy_load_command("beluga_airflow.cli.model_server.model_server"),
                    args=tuple(Arg((flag,), **about) for flag, about in model_options.OPTIONS),
                ),
            ],
        )
    ]
