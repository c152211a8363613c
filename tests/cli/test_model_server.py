"""``airflow beluga model-server``, as a person starts it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import httpx
import pytest

from beluga_airflow.cli.commands import get_commands

DEADLINE = 60


def parsed(*arguments: str) -> Namespace:
    (group,) = get_commands()
    (command,) = (each for each in group.subcommands if each.name == "model-server")
    parser = ArgumentParser(description=command.description)
    for argument in command.args:
        argument.add_to_parser(parser)
    return parser.parse_args(arguments)


def test_its_options_are_its_own() -> None:
    assert vars(parsed()) == {"host": "127.0.0.1", "port": 8400, "rules": None, "latency": 0.0, "api_key_env": None}
    assert parsed("--rules", "rules.yaml", "--port", "0").rules == "rules.yaml"


def test_its_help_says_enough(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit):
        parsed("--help")
    told = " ".join(capsys.readouterr().out.split())
    for word in ("SIMULATES", "docs/model-server.md", "--rules", "what the endpoint can do", "GET /calls", "8400"):
        assert word in told


async def test_the_command_serves_a_rules_file(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("endpoint: {without_schema: json}\nrules:\n- {answer: expedite, reason: why}\n")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "airflow", "beluga", "model-server", "--rules", str(rules), "--port", "0"),
        env=os.environ | {"AIRFLOW_HOME": str(tmp_path)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(DEADLINE):
            while b"(SIMULATION) listening on" not in (line := await process.stdout.readline()):
                assert line, "it ended"
        base_url = line.decode().split()[-1]
        async with httpx.AsyncClient(timeout=DEADLINE) as http:
            body = {"model": "m", "messages": [{"role": "user", "content": "How?"}]}
            reply = (await http.post(f"{base_url}/chat/completions", json=body)).json()
        assert reply["choices"][0]["message"]["content"] == '{"answer": "expedite", "reason": "why"}'
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), DEADLINE) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
