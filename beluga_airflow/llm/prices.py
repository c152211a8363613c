"""What tokens cost, by the price list of genai-prices."""

from __future__ import annotations

from beluga_airflow.llm.client import Usage
from beluga_airflow.llm.presets import PRESETS

__all__ = ["cost_usd"]


def cost_usd(usage: Usage, *, provider: str, model: str) -> float | None:
    """US dollars for one call; None where the price list does not know provider and model."""
    listed = PRESETS[provider].prices if provider in PRESETS else None
    if listed is None:
        # without a provider the list would price a model of one's own like the vendor's of the same name
        return None
    from genai_prices import Usage as PricedUsage
    from genai_prices import calc_price

    try:
        price = calc_price(
            PricedUsage(input_tokens=usage.input, output_tokens=usage.output), model_ref=model, provider_id=listed
        )
    except LookupError:
        return None
    return float(price.total_price)
