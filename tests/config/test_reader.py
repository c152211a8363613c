from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import beluga_airflow.config
from beluga_airflow.config import (
    ChainSettings,
    GraphSettings,
    LLMSettings,
    Settings,
    StateSettings,
    TemporalSettings,
    WorkflowSettings,
    load_settings,
)
from beluga_airflow.config.reader import KEYS, LIMIT, Origin, read
from beluga_airflow.config.settings import PROVIDERS
from beluga_airflow.errors import InvalidSetting

SECRET = "hush-5e11"  # noqa: S105  # made up
EXAMPLE = """\
orchestration:
  chain:
    timeout: 300s
    max_retries: 3
  graph:
    max_workers: 10
    parallel_execution: true
    timeout: 600s
  workflow:
    temporal:
      address: "localhost:7233"
      namespace: "default"
      task_queue: "beluga-workflows"
    timeout: 3600s
    max_retries: 5
llm:
  provider: "openai"
  model: "gpt-4o"
  timeout: 30s
state:
  url: sqlite:////var/lib/beluga/state.db
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "beluga.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refused(path: Path) -> str:
    """What is said of a file; it never holds the secret."""
    with pytest.raises(InvalidSetting) as caught:
        load_settings(path)
    told = str(caught.value)
    assert SECRET not in told
    assert caught.value.__cause__ is None, "what is under it would be printed too"
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return told.replace(str(path), "F")


# what it reads


def test_all_keys_as_the_issue_has_them(write: Write) -> None:
    expected = Settings(
        workflow=WorkflowSettings(max_retries=5), state=StateSettings(url="sqlite:////var/lib/beluga/state.db")
    )
    assert load_settings(write(EXAMPLE)) == expected
    assert load_settings(str(write(EXAMPLE))) == expected


def test_every_key_reaches_its_setting(write: Write) -> None:
    path = write("""\
orchestration:
  chain: {timeout: 1s, max_retries: 11}
  graph: {max_workers: 12, parallel_execution: off, timeout: 2m}
  workflow:
    temporal: {address: "[::1]:99", namespace: n, task_queue: q}
    timeout: PT3H
    max_retries: 0
llm: {provider: ollama, model: llama3.1, timeout: 4}
state: {url: "redis://:pw@h:1/0"}
""")
    assert load_settings(path) == Settings(
        chain=ChainSettings(timeout=1, max_retries=11),
        graph=GraphSettings(max_workers=12, parallel_execution=False, timeout=120),
        workflow=WorkflowSettings(
            temporal=TemporalSettings(address="[::1]:99", namespace="n", task_queue="q"), timeout=10_800, max_retries=0
        ),
        llm=LLMSettings(provider="ollama", model="llama3.1", timeout=4),
        state=StateSettings(url="redis://:pw@h:1/0"),
    )


def test_every_key_is_in_the_example() -> None:
    def keys(node: Any, prefix: str = "") -> list[str]:
        if not isinstance(node, dict):
            return [prefix.removesuffix(".")]
        return [key for name, value in node.items() for key in keys(value, f"{prefix}{name}.")]

    assert sorted(keys(yaml.safe_load(EXAMPLE))) == sorted(KEYS)


@pytest.mark.parametrize(
    "text", ["", "\n# nothing\n", "---\n", "{}", "llm:\n", "orchestration:\n  chain:\n  # timeout: 5s\n", "\ufeff{}"]
)
def test_a_file_that_says_nothing(write: Write, text: str) -> None:
    assert load_settings(write(text)) == Settings()


def test_where_each_value_stands(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "m")
    monkeypatch.setenv("PW", SECRET)
    path = write("# first\nllm:\n\n  model: ${MODEL}\nstate:\n  url: redis://:${PW}@h/0\n")
    file = read(path)
    assert file.path == path
    assert file.origins == {
        "llm.model": Origin(line=4, variables=("MODEL",)),
        "state.url": Origin(line=6, variables=("PW",)),
    }
    assert SECRET not in repr(file)


def test_typed_values_come_from_the_environment(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RETRIES": "7", "MINUTES": "2", "ON": "false", "MODEL": " llama \n"}.items():
        monkeypatch.setenv(name, value)
    found = load_settings(
        write(
            "orchestration:\n  chain: {timeout: '${MINUTES}m', max_retries: '${RETRIES}'}\n"
            "  graph:\n    parallel_execution: ${ON}\nllm: {model: 'x-${MODEL}'}\n"
        )
    )
    assert (found.chain.timeout, found.chain.max_retries, found.graph.parallel_execution) == (120, 7, False)
    assert found.llm.model == "x- llama"


def test_a_value_is_a_text_whatever_yaml_takes_it_for(write: Write) -> None:
    path = write("orchestration: {workflow: {temporal: {namespace: no, task_queue: 2020-01-01}}}\nllm: {model: 4}\n")
    found = load_settings(path)
    temporal = found.workflow.temporal
    assert (temporal.namespace, temporal.task_queue, found.llm.model) == ("no", "2020-01-01", "4")


def test_an_alias_is_what_it_stands_for(write: Write) -> None:
    path = write("orchestration:\n  chain: {timeout: &long 900s}\n  graph: {timeout: *long}\n")
    assert load_settings(path).graph.timeout == 900


# what it refuses


@pytest.mark.parametrize(
    ("text", "told"),
    [
        # a key that is none
        (
            "\nllms: {}",
            "F:2: unknown key 'llms': did you mean 'llm'? at the top there can be: orchestration, llm, state",
        ),
        (
            "orchestration:\n  chian: {}",
            "F:2: unknown key 'orchestration.chian': did you mean 'orchestration.chain'? under 'orchestration' there "
            "can be: chain, graph, workflow",
        ),
        ("llm:\n  timout: 5s", "F:2: unknown key 'llm.timout': did you mean 'llm.timeout'? under 'llm' there can be"),
        ("LLM: {}", "F:1: unknown key 'LLM': did you mean 'llm'? at the top"),
        ("chain: {}", "F:1: unknown key 'chain': did you mean 'orchestration.chain'? at the top"),
        ("temporal: {}", "F:1: unknown key 'temporal': did you mean 'orchestration.workflow.temporal'? at the top"),
        (
            "orchestration:\n  graph:\n    max_retries: 3",
            "F:3: unknown key 'orchestration.graph.max_retries'; under 'orchestration.graph' there can be: "
            "max_workers, parallel_execution, timeout",
        ),
        (f"llm:\n  api_key: {SECRET}", "F:2: unknown key 'llm.api_key'; under 'llm' there can be: provider, model"),
        ("1: 2", "F:1: unknown key '1'; at the top"),
        ("{}: 2", "F:1: a key is no text; at the top there can be"),
        ("llm:\n  <<: {model: x}", "F:2: unknown key 'llm.<<'; under"),
        ("'a\\nb': 1", r"F:1: unknown key 'a\\nb'; at the top"),
        (f"{'k' * 999}: 1", f"F:1: unknown key '{'k' * 79}...; at the top"),
        # twice
        ("llm:\n  model: a\n  model: b", "F:3: the key 'llm.model' is there twice, in line 2 too; drop one"),
        ("llm: {}\nstate: {}\nllm: {}", "F:3: the key 'llm' is there twice, in line 1 too"),
        # of another kind
        ("- llm", "F:1: the file holds a list, it must be a mapping of: orchestration, llm, state"),
        ("just a text", "F:1: the file holds a single value, it must be a mapping of"),
        ("llm:\n  - model: x", "F:2: 'llm' is a list, it must be a mapping of: provider, model, timeout"),
        (
            "orchestration:\n  chain: 5",
            "F:2: 'orchestration.chain' is a single value, it must be a mapping of: timeout",
        ),
        ("llm:\n  model: [a]", "F:2: 'llm.model' is a list, it must be a text"),
        ("llm:\n  model:\n    a: b", "F:3: 'llm.model' is a mapping, it must be a text"),
        ("llm:\n  model:", "F:2: 'llm.model' has no value; give it one, or leave the key out"),
        ("llm:\n  model: ~", "F:2: 'llm.model' has no value"),
        ("llm:\n  model: null", "F:2: 'llm.model' has no value"),
        ("orchestration: {workflow: {max_retries: null}}", "F:1: 'orchestration.workflow.max_retries' has no value"),
        ("llm:\n  model: !!python/object/apply:os.system [echo]", "F:2: 'llm.model' is a list"),
        ("llm:\n  model: !!python/name:os.system x", "F:2: 'llm.model' has a tag (!...), which means nothing here"),
        ("llm:\n  model: !secret x", "F:2: 'llm.model' has a tag"),
        # a bad value
        (
            "llm:\n  timeout: soon",
            "F:2: 'llm.timeout' is 'soon', it must be a duration above 0: 300s, 5m, 1h, PT5M, or a number of seconds",
        ),
        ("llm:\n  timeout: 0", "F:2: 'llm.timeout' is '0', it must be a duration above 0"),
        ("llm:\n  timeout: 1:30", "F:2: 'llm.timeout' is '1:30', it must be"),
        ("llm: {timeout: .inf}", "F:1: 'llm.timeout' is '.inf', it must be"),
        (
            "orchestration: {chain: {max_retries: -1}}",
            "F:1: 'orchestration.chain.max_retries' is '-1', it must be a whole number, 0 or more",
        ),
        (
            "orchestration: {graph: {max_workers: 0}}",
            "F:1: 'orchestration.graph.max_workers' is '0', it must be a whole number, 1 or more",
        ),
        (
            "orchestration: {graph: {parallel_execution: 1}}",
            "F:1: 'orchestration.graph.parallel_execution' is '1', it must be true or false",
        ),
        (
            "llm: {provider: opnai}",
            f"F:1: 'llm.provider' is 'opnai', it must be one of {', '.join(PROVIDERS)}",
        ),
        (
            "orchestration: {workflow: {temporal: {address: 'http://t:7233'}}}",
            "F:1: 'orchestration.workflow.temporal.address' is 'http://t:7233', it must be host:port, such as "
            "localhost:7233",
        ),
        ("orchestration: {workflow: {temporal: {address: t.example}}}", "it must be host:port"),
        ("llm: {model: ''}", "F:1: 'llm.model' is '', it must be a text of printable characters"),
        ('llm: {model: "a\\u202eb"}', r"F:1: 'llm.model' is 'a\u202eb', it must be"),
        (f"llm: {{timeout: '{'9' * 999}x'}}", f"F:1: 'llm.timeout' is '{'9' * 79}..., it must be"),
        (
            f"state:\n  url: {SECRET}",
            "F:2: 'state.url' is something else (it is not shown, as it may hold a password), it must be the URL of a "
            "state store, such as sqlite:////path/to/state.db",
        ),
        (f"state: {{url: 'mysql://u:{SECRET}@h'}}", "F:1: 'state.url' is something else"),
        # libpq would take a part of such a password for the host, which messages show
        (f"state: {{url: 'postgresql://u:pw/{SECRET}@h/db'}}", "F:1: 'state.url' is something else"),
        (f"state: {{url: 'postgres://u:pw@{SECRET}@h/db'}}", "signs such as @ or / in a password as %40, %2F"),
        (f"state: {{url: ['redis://{SECRET}']}}", "F:1: 'state.url' is a list, it must be the URL"),
        # no YAML
        (
            "llm:\n\tmodel: x",
            "F:2:1: this is no YAML: found character '\\t' that cannot start any token; mend the file",
        ),
        ("llm: {model: x", "F:1:15: this is no YAML: expected ',' or '}', but got '<stream end>'"),
        ("llm: {model: ${MODEL}}", "F:1:15: this is no YAML: expected ',' or '}', but got '{'"),
        ("llm: {}\n---\nllm: {}", "F:2:1: this is no YAML: but found another document"),
        (f"state:\n  url: *{SECRET}", "F:2:8: this is no YAML: found undefined alias (...); mend"),
        (f"state:\n  url: !{SECRET}!x y", "F:2:8: this is no YAML: found undefined tag handle (...)"),
        (f"state:\n  url: %{SECRET}", "F:2:8: this is no YAML: found character '%' that cannot start any token"),
        (f"state:\n  url: 'redis://:{SECRET}", "F:2:27: this is no YAML: found unexpected end of stream"),
        ("llm:\n  model: \x00", "F:2: this is no YAML: it holds a character that YAML has not"),
        ("[" * 60_000, "F: this is no YAML that can be read"),
        ("llm: " + "{llm: " * 9_000, "F: this is no YAML that can be read"),
        # neither
        (b"llm:\n  model: \xff", "F:2: this is no UTF-8; save the file as UTF-8"),
        ("llm: {}".encode("utf-16"), "F:1: this is no UTF-8"),
        ("#" * (LIMIT + 1), f"F is larger than {LIMIT} bytes"),
    ],
)
def test_a_fault_is_told_with_its_place(write: Write, text: str | bytes, told: str) -> None:
    assert told in refused(write(text))


def test_aliases_do_not_multiply(write: Write) -> None:
    bomb = "a0: &a0 x\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    started = time.monotonic()
    assert "F:1: unknown key 'a0'" in refused(write(bomb))
    assert "F:1: unknown key 'orchestration.chain.chain'" in refused(write("orchestration: &o {chain: *o}"))
    assert "F:1: 'llm.model' is a mapping" in refused(write("llm: &o {model: *o}"))
    assert time.monotonic() - started < 2


def test_a_variable_is_named_and_what_it_holds_is_not_shown(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    assert refused(write("llm:\n  model: ${NOT_SET}")) == (
        "F:2: 'llm.model' asks for the environment variable NOT_SET, which is not set in this process"
    )
    assert "F:1: 'state.url' has a '${' without the name" in refused(write("state: {url: 'redis://:${" + SECRET + "'}"))
    monkeypatch.setenv("PW", SECRET)
    for key, text in [
        ("llm.timeout", "llm: {timeout: '${PW}'}"),
        ("llm.provider", "llm: {provider: '${PW}'}"),
        ("orchestration.chain.max_retries", "orchestration: {chain: {max_retries: '${PW}'}}"),
        ("orchestration.workflow.temporal.address", "orchestration: {workflow: {temporal: {address: '${PW}'}}}"),
    ]:
        assert f"F:1: '{key}' is '${{PW}}', filled from PW, it must be" in refused(write(text))
    assert "F:1: 'state.url' is something else" in refused(write("state: {url: '${PW}'}"))


def test_what_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert refused(tmp_path / "none.yaml") == "there is no file F; make it, or correct the path"
    assert refused(tmp_path) == "F is no file; name a YAML file with settings"
    assert refused(pipe) == "F is no file; name a YAML file with settings"
    assert "cannot be read: " in refused(Path("a\0b"))
    assert refused(tmp_path / ("x" * 300)) == "F cannot be read: File name too long; see to its permissions"


def test_a_file_that_may_not_be_read(write: Write) -> None:
    path = write("llm: {}")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    assert refused(path) == "F cannot be read: Permission denied; see to its permissions"


# any file

NAMES = st.from_regex(r"[A-Za-z][A-Za-z0-9._-]{0,15}", fullmatch=True)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "timeout": st.integers(1, 10**6) | st.floats(0.001, 10**6).map(lambda value: round(value, 3)),
    "max_retries": st.integers(0, 10**6),
    "max_workers": st.integers(1, 10**6),
    "parallel_execution": st.booleans(),
    "address": st.tuples(NAMES, st.integers(1, 65_535)).map(lambda pair: f"{pair[0]}:{pair[1]}"),
    "provider": st.sampled_from(PROVIDERS),
    "url": NAMES.map(lambda name: f"sqlite:////{name}"),
}
MAPPINGS = st.fixed_dictionaries({}, optional={key: VALUES.get(key.rpartition(".")[2], NAMES) for key in KEYS})
QUICK = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def nested(values: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        part = tree
        for section in sections:
            part = part.setdefault(section, {})
        part[name] = value
    return tree


@QUICK
@given(values=MAPPINGS, flow=st.booleans())
def test_any_mapping_of_its_keys_comes_back(write: Write, values: dict[str, Any], flow: bool) -> None:
    path = write(yaml.safe_dump(nested(values), default_flow_style=flow, width=10**6))
    file = read(path)
    assert sorted(file.origins) == sorted(values)
    expected = Settings()
    for key, value in values.items():
        *parts, name = key.removeprefix("orchestration.").split(".")
        expected = _with(expected, parts, name, value)
    assert file.settings == expected
    lines = path.read_text().splitlines()
    for key, origin in file.origins.items():
        assert f"{key.rpartition('.')[2]}:" in lines[origin.line - 1]


def _with(part: Any, path: list[str], name: str, value: Any) -> Any:
    if not path:
        return replace(part, **{name: value})
    return replace(part, **{path[0]: _with(getattr(part, path[0]), path[1:], name, value)})


@QUICK
@given(values=MAPPINGS, key=st.sampled_from(KEYS), name=NAMES, depth=st.integers(0, 4))
def test_any_other_key_is_refused_with_its_line(
    write: Write, values: dict[str, Any], key: str, name: str, depth: int
) -> None:
    sections = key.split(".")[:-1][:depth]
    start = "".join(f"{section}." for section in sections)
    known = {other.removeprefix(start).partition(".")[0] for other in KEYS if other.startswith(start)}
    if name in known or "." in name:
        return
    tree = nested(values)
    part = tree
    for section in sections:
        part = part.setdefault(section, {})
    part[name] = 1
    path = write(yaml.safe_dump(tree, default_flow_style=False))
    told = refused(path)
    found = re.match(r"F:(\d+): unknown key '([^']*)'", told)
    assert found, told
    line = path.read_text().splitlines()[int(found[1]) - 1].strip().strip("'")
    assert found[2] == start + name
    assert line.startswith(name)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text("{}[]:,-&*!|>'\"%@`#? \n\tabllmstateurl0", max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(write: Write, data: bytes) -> None:
    with suppress(InvalidSetting):
        assert isinstance(load_settings(write(data)), Settings)


# the room


def test_the_room_offers_it_and_loads_yaml_only_for_it() -> None:
    assert set(beluga_airflow.config.__all__) >= {"Settings", "load_settings"}
    with pytest.raises(AttributeError, match=r"module 'beluga_airflow\.config' has no attribute 'nothing'"):
        beluga_airflow.config.nothing  # noqa: B018
    program = """
import sys
from beluga_airflow.config import Settings
Settings()
before = {"yaml", "pendulum", "airflow"} & set(sys.modules)
from beluga_airflow.config import load_settings
print(before, "yaml" in sys.modules, "airflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "set() True False"


# what is written of it


def test_the_documented_file_is_all_keys_with_their_defaults(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    documentation = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    (example,) = re.findall(r"```yaml\n(.*?)```", documentation, flags=re.DOTALL)
    monkeypatch.setenv("REDIS_PASSWORD", SECRET)
    file = read(write(example))
    assert sorted(file.origins) == sorted(KEYS)
    assert file.settings == Settings(
        workflow=WorkflowSettings(max_retries=5), state=StateSettings(url=f"redis://:{SECRET}@redis.internal:6379/0")
    )
    rows = re.findall(r"^\| `([a-z_.]+)` \|", documentation, flags=re.MULTILINE)
    assert rows == list(KEYS)
    for provider in PROVIDERS:
        assert f"`{provider}`" in documentation
