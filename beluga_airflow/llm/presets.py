"""The endpoints that need no more than their name."""

from __future__ import annotations

from dataclasses import dataclass

from beluga_airflow.errors import InvalidSetting

__all__ = ["PRESETS", "Preset", "preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A provider that speaks the OpenAI API.

    Args:
        base_url: its address; None where the connection must say.
        key_variable: the environment variable its key is usually kept in; None where it wants no key.
        prices: its name in genai-prices.
        limit: the parameter that bounds the tokens of an answer, where the present one is not known there.
    """

    base_url: str | None
    key_variable: str | None
    prices: str | None = None
    limit: str = "max_completion_tokens"


PRESETS = {
    "openai": Preset(base_url="https://api.openai.com/v1", key_variable="OPENAI_API_KEY", prices="openai"),
    "azure": Preset(base_url=None, key_variable="AZURE_OPENAI_API_KEY", prices="azure"),
    "anthropic": Preset(base_url="https://api.anthropic.com/v1", key_variable="ANTHROPIC_API_KEY", prices="anthropic"),
    "gemini": Preset(
        base_url="https://generativelanguage.googleapis.com/v1beta/openai",
        key_variable="GEMINI_API_KEY",
        prices="google",
    ),
    "groq": Preset(base_url="https://api.groq.com/openai/v1", key_variable="GROQ_API_KEY", prices="groq"),
    "mistral": Preset(
        base_url="https://api.mistral.ai/v1", key_variable="MISTRAL_API_KEY", prices="mistral", limit="max_tokens"
    ),
    "openrouter": Preset(
        base_url="https://openrouter.ai/api/v1", key_variable="OPENROUTER_API_KEY", prices="openrouter"
    ),
    "ollama": Preset(base_url="http://localhost:11434/v1", key_variable=None, limit="max_tokens"),
    "vllm": Preset(base_url="http://localhost:8000/v1", key_variable=None),
    # the model server of this package; its answers are priced as the model it stands in for would be
    "simulated": Preset(base_url="http://localhost:8400/v1", key_variable=None, prices="openai"),
}


def preset(provider: str) -> Preset:
    """The preset of that name.

    Raises:
        InvalidSetting: there is none.
    """
    if provider not in PRESETS:
        raise InvalidSetting(
            f"unknown model provider {provider!r}; known are {', '.join(PRESETS)}. For any other endpoint that speaks "
            "the OpenAI API use provider 'openai' and set base_url"
        )
    return PRESETS[provider]
