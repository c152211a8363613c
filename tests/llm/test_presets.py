from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.llm.client import Endpoint
from beluga_airflow.llm.presets import PRESETS, preset


def test_an_unknown_provider_lists_the_known_ones() -> None:
    with pytest.raises(InvalidSetting) as caught:
        preset("opnai")
    assert "unknown model provider 'opnai'" in str(caught.value)
    assert all(name in str(caught.value) for name in PRESETS)
    assert "provider 'openai' and set base_url" in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_used_as_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = preset(name)
    if found.key_variable:
        monkeypatch.setenv(found.key_variable, "from-the-environment")
    endpoint = Endpoint(provider=name, base_url=None if found.base_url else "https://own.example/v1")
    assert endpoint.key == ("from-the-environment" if found.key_variable else "none")
    parts = urlsplit(endpoint.address)
    local = parts.hostname == "localhost"
    assert parts.scheme == ("http" if local else "https"), "a key does not travel in the clear"
    assert local == (found.key_variable is None)


def test_a_base_url_wins() -> None:
    assert Endpoint(provider="openai", base_url="http://localhost:9/v1").address == "http://localhost:9/v1"
