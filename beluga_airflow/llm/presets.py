"""The endpoints that need no more than their name. Each names the page on which its provider documents it.

``json_schema`` and ``logprobs`` are False only where that page says so; of the rest the name of the token limit is the
older one, which OpenAI-compatible endpoints take, unless a page says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from beluga_airflow.errors import InvalidSetting

__all__ = ["PRESETS", "Preset", "preset"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A provider that speaks the OpenAI API.

    Args:
        base_url: its address; None where the connection must say.
        key_variable: the environment variable its key is usually kept in; None where it wants no key.
        docs: the page on which its address, its key and its parameters are documented.
        prices: its name in genai-prices.
        limit: the parameter that bounds the tokens of an answer, where the present one is not known there.
        address_form: what ``base_url`` looks like where the connection must say it.
        json_schema, logprobs: False where the page says that these are ignored or refused: then they are not asked for,
            unless the connection says so.
    """

    base_url: str | None
    key_variable: str | None
    docs: str
    prices: str | None = None
    limit: str = "max_completion_tokens"
    address_form: str = ""
    json_schema: bool = True
    logprobs: bool = True


PRESETS = {
    "openai": Preset(
        base_url="https://api.openai.com/v1",
        key_variable="OPENAI_API_KEY",
        prices="openai",
        docs="https://platform.openai.com/docs/api-reference/chat/create",
    ),
    "azure": Preset(
        base_url=None,
        key_variable="AZURE_OPENAI_API_KEY",
        prices="azure",
        # the API without api-version, which the plain OpenAI client speaks
        address_form="https://RESOURCE.openai.azure.com/openai/v1",
        docs="https://learn.microsoft.com/en-us/azure/foundry/openai/api-version-lifecycle",
    ),
    "anthropic": Preset(
        base_url="https://api.anthropic.com/v1",
        key_variable="ANTHROPIC_API_KEY",
        prices="anthropic",
        docs="https://platform.claude.com/docs/en/api/openai-sdk",
        json_schema=False,
        logprobs=False,
    ),
    "gemini": Preset(
        base_url="https://generativelanguage.googleapis.com/v1beta/openai",
        key_variable="GEMINI_API_KEY",
        prices="google",
        docs="https://ai.google.dev/gemini-api/docs/openai",
    ),
    "groq": Preset(
        base_url="https://api.groq.com/openai/v1",
        key_variable="GROQ_API_KEY",
        prices="groq",
        docs="https://console.groq.com/docs/openai",
        logprobs=False,
    ),
    "mistral": Preset(
        base_url="https://api.mistral.ai/v1",
        key_variable="MISTRAL_API_KEY",
        prices="mistral",
        limit="max_tokens",
        docs="https://docs.mistral.ai/api",
    ),
    "deepseek": Preset(
        base_url="https://api.deepseek.com",
        key_variable="DEEPSEEK_API_KEY",
        prices="deepseek",
        limit="max_tokens",
        docs="https://api-docs.deepseek.com/",
    ),
    "xai": Preset(
        base_url="https://api.x.ai/v1",
        key_variable="XAI_API_KEY",
        prices="x-ai",
        docs="https://docs.x.ai/api/integrations",
    ),
    "together": Preset(
        base_url="https://api.together.ai/v1",
        key_variable="TOGETHER_API_KEY",
        prices="together",
        limit="max_tokens",
        docs="https://docs.together.ai/docs/inference/openai-compatibility",
    ),
    "fireworks": Preset(
        base_url="https://api.fireworks.ai/inference/v1",
        key_variable="FIREWORKS_API_KEY",
        prices="fireworks",
        limit="max_tokens",
        docs="https://docs.fireworks.ai/tools-sdks/openai-compatibility",
    ),
    "openrouter": Preset(
        base_url="https://openrouter.ai/api/v1",
        key_variable="OPENROUTER_API_KEY",
        prices="openrouter",
        docs="https://openrouter.ai/docs/requests",
    ),
    "cohere": Preset(
        base_url="https://api.cohere.ai/compatibility/v1",
        key_variable="COHERE_API_KEY",
        prices="cohere",
        limit="max_tokens",
        docs="https://docs.cohere.com/docs/compatibility-api",
    ),
    "perplexity": Preset(
        base_url="https://api.perplexity.ai",
        key_variable="PERPLEXITY_API_KEY",
        prices="perplexity",
        limit="max_tokens",
        docs="https://docs.perplexity.ai/docs/sonar/openai-compatibility",
    ),
    "cerebras": Preset(
        base_url="https://api.cerebras.ai/v1",
        key_variable="CEREBRAS_API_KEY",
        prices="cerebras",
        docs="https://inference-docs.cerebras.ai/api-reference/chat-completions",
    ),
    "sambanova": Preset(
        base_url="https://api.sambanova.ai/v1",
        key_variable="SAMBANOVA_API_KEY",
        limit="max_tokens",
        docs="https://docs.sambanova.ai/docs/en/features/openai-compatibility",
    ),
    "nvidia": Preset(
        base_url="https://integrate.api.nvidia.com/v1",
        key_variable="NVIDIA_API_KEY",
        limit="max_tokens",
        docs="https://docs.api.nvidia.com/nim/reference/",
    ),
    "huggingface": Preset(
        base_url="https://router.huggingface.co/v1",
        key_variable="HF_TOKEN",
        limit="max_tokens",
        docs="https://huggingface.co/docs/inference-providers/tasks/chat-completion",
    ),
    "deepinfra": Preset(
        base_url="https://api.deepinfra.com/v1/openai",
        key_variable="DEEPINFRA_TOKEN",
        limit="max_tokens",
        docs="https://docs.deepinfra.com/chat/overview",
    ),
    "ollama": Preset(
        base_url="http://localhost:11434/v1",
        key_variable=None,
        limit="max_tokens",
        docs="https://docs.ollama.com/api/openai-compatibility",
    ),
    "lmstudio": Preset(
        base_url="http://localhost:1234/v1",
        key_variable=None,
        limit="max_tokens",
        docs="https://lmstudio.ai/docs/developer/openai-compat",
    ),
    "vllm": Preset(
        base_url="http://localhost:8000/v1",
        key_variable=None,
        docs="https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html",
    ),
    # the model server of this package; its answers are priced as the model it stands in for would be
    "simulated": Preset(
        base_url="http://localhost:8400/v1",
        key_variable=None,
        prices="openai",
        docs="model-server.md",
    ),
}


def preset(provider: str) -> Preset:
    """The preset of that name.

    Raises:
        InvalidSetting: there is none.
    """
    if provider not in PRESETS:
        near = get_close_matches(provider.lower(), PRESETS, n=1)
        suggestion = f": did you mean {near[0]!r}?" if near else ";"
        raise InvalidSetting(
            f"unknown model provider {provider!r}{suggestion} known are {', '.join(PRESETS)}. For any other endpoint "
            "that speaks the OpenAI API use provider 'openai' and set base_url"
        )
    return PRESETS[provider]
