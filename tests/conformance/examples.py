"""All examples."""

from __future__ import annotations

from tests.conformance import flow_examples, nested_examples, trouble_examples

__all__ = ["EXAMPLES"]

EXAMPLES = (*flow_examples.EXAMPLES, *trouble_examples.EXAMPLES, *nested_examples.EXAMPLES)
