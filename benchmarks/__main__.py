"""All questions, into benchmarks/results.json and docs/benchmarks.md."""

from __future__ import annotations

import importlib

from harness import text, write

QUESTIONS = ("steps", "curve", "imports", "stores", "watching", "breaker")

if __name__ == "__main__":
    answers = {}
    for name in QUESTIONS:
        answers[name] = importlib.import_module(name).measured()
        print(text(answers[name]), end="\n\n", flush=True)
    write(answers)
