from __future__ import annotations

import pytest

from beluga_airflow.llm.client import Usage
from beluga_airflow.llm.prices import cost_usd

MANY = Usage(input=1_000_000, output=1_000_000)


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "gpt-4o"),
        ("azure", "gpt-4o"),
        ("anthropic", "claude-sonnet-4-5"),
        ("gemini", "gemini-2.0-flash"),
        ("groq", "llama-3.3-70b-versatile"),
        ("mistral", "mistral-large-latest"),
        ("openrouter", "openai/gpt-4o"),
    ],
)
def test_the_list_knows_the_vendors_models(provider: str, model: str) -> None:
    cost = cost_usd(MANY, provider=provider, model=model)
    assert cost is not None
    assert 0.01 < cost < 1000
    assert cost_usd(Usage(), provider=provider, model=model) == 0


def test_a_price_is_per_token() -> None:
    # OpenAI's list: 2.50 and 10.00 dollars a million
    assert cost_usd(MANY, provider="openai", model="gpt-4o") == pytest.approx(12.5)
    assert cost_usd(Usage(input=1000, output=100), provider="openai", model="gpt-4o") == pytest.approx(0.0035)


def test_a_simulation_costs_what_its_model_would() -> None:
    assert cost_usd(MANY, provider="simulated", model="gpt-4o") == cost_usd(MANY, provider="openai", model="gpt-4o")


@pytest.mark.parametrize(
    ("provider", "model"),
    [
        ("openai", "a-model-of-ours"),
        ("openai", ""),
        ("azure", "our-deployment"),
        # a model of one's own is not the vendor's of the same name
        ("ollama", "gpt-4o"),
        ("vllm", "gpt-4o"),
        ("nobody", "gpt-4o"),
    ],
)
def test_an_unknown_price_is_none_and_not_zero(provider: str, model: str) -> None:
    assert cost_usd(MANY, provider=provider, model=model) is None
