"""`run()` with settings of a file: in place of the defaults, and behind what it is given itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beluga_airflow import Chain, Decision, run
from beluga_airflow.config import load_settings
from beluga_airflow.errors import InvalidSetting
from beluga_airflow.llm.client import Endpoint
from beluga_airflow.llm.model_server import ModelServer
from beluga_airflow.state import open_store
from beluga_airflow.state.memory import MemoryStore

Write = Callable[[str], Path]


@pytest.fixture
def model_rules() -> Any:
    return [{"when": {"tier": "gold"}, "answer": "expedite"}]


def asking(**options: Any) -> Chain:
    decision = Decision("How?", choices=["expedite", "standard"], reads=("tier",))
    return Chain("orders", **options).add_step("handling", decision)


async def test_the_file_that_airflow_names_is_none_of_its_matters(config_file: Write) -> None:
    config_file("llm: {")
    result = await run(Chain("c").add_step("a", lambda data: {"a": 1}), {})
    assert result.data == {"a": 1}


async def test_time_and_retries_are_those_of_the_settings(config_file: Write) -> None:
    attempts: list[int] = []

    def fails(data: dict[str, Any]) -> None:
        attempts.append(1)
        raise ConnectionError("no")

    settings = load_settings(config_file("orchestration: {chain: {max_retries: 1}}"))
    result = await run(Chain("c").add_step("a", fails), {}, settings=settings)
    assert (result.status, len(attempts)) == ("failed", 2)


async def test_the_model_is_that_of_the_settings(
    config_file: Write, model_server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from beluga_airflow.llm.presets import PRESETS, Preset

    monkeypatch.setitem(PRESETS, "simulated", Preset(base_url=model_server.base_url, key_variable=None, docs=""))
    settings = load_settings(config_file("llm: {provider: simulated, model: gpt-4.1}"))
    result = await run(asking(), {"tier": "gold"}, settings=settings)
    assert result.decisions["handling"]["model"] == "gpt-4.1"
    endpoint = Endpoint(provider="simulated", model="gpt-4o-mini", base_url=model_server.base_url)
    result = await run(asking(), {"tier": "gold"}, settings=settings, endpoint=endpoint)
    assert result.decisions["handling"]["model"] == "gpt-4o-mini", "an argument goes before"


async def test_records_are_kept_where_the_settings_say(
    config_file: Write, model_server: ModelServer, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'state.db'}"
    settings = load_settings(config_file(f"state: {{url: '{url}'}}"))
    endpoint = Endpoint(provider="simulated", base_url=model_server.base_url)
    own = MemoryStore()
    await run(asking(), {"tier": "gold"}, key="o-1", settings=settings, endpoint=endpoint, state=own)
    assert not (tmp_path / "state.db").exists(), "an argument goes before"
    for _ in range(2):
        result = await run(asking(), {"tier": "gold"}, key="o-1", settings=settings, endpoint=endpoint)
        assert result.data["handling"] == "expedite"
    assert model_server.calls == 2, "the second run reads the record"
    store = open_store(url)
    assert [key async for key in store.keys("beluga/decisions/")]
    await store.close()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="there is no file"):
        load_settings(tmp_path / "none.yaml")
