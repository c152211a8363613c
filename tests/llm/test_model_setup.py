from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from beluga_airflow.errors import InvalidSetting
from beluga_airflow.llm.model_rules import Rule
from beluga_airflow.llm.model_setup import Setup, Traits, load_setup
from beluga_airflow.llm.model_troubles import Trouble

PAGE = Path(__file__).parents[2] / "docs" / "model-server.md"

WHOLE: dict[str, Any] = {
    "endpoint": {"json_schema": "refused", "top_logprobs": 2},
    "models": {"large": None, "tiny": {"top_logprobs": 0, "logprobs": "none"}},
    "troubles": [{"kind": "rate_limit", "retry_after": 2, "calls": [1, 3]}, {"kind": "slow", "every": 1}],
    "rules": [{"when": {"tier": "gold"}, "probabilities": {"expedite": 0.7, "standard": 0.3}}, {"answer": "standard"}],
}


def test_a_file_is_read_as_yaml_or_json_or_given(tmp_path: Path) -> None:
    as_yaml, as_json = tmp_path / "rules.yaml", tmp_path / "rules.json"
    as_yaml.write_text(yaml.safe_dump(WHOLE))
    as_json.write_text(json.dumps(WHOLE))
    setup = load_setup(as_yaml)
    assert setup == load_setup(str(as_json)) == load_setup(WHOLE)
    assert setup.traits("large") == setup.traits("other") == Traits(json_schema="refused", top_logprobs=2)
    assert setup.traits("tiny") == Traits(json_schema="refused", top_logprobs=0, logprobs="none")
    assert [trouble.kind for trouble in setup.troubles] == ["rate_limit", "slow"]
    assert [rule.answer for rule in setup.rules] == ["expedite", "standard"]


def test_every_part_may_be_left_out() -> None:
    assert load_setup({}) == load_setup([]) == Setup()
    assert load_setup({"endpoint": None, "models": None, "troubles": None, "rules": None}) == Setup()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rules:\n- answer: a\n- wen: {}\n  answer: b\n", "rule 2, wen: Extra inputs are not permitted; correct its "),
        ("rules:\n- answer: a\n- wen: {}\n  answer: b\n", "or leave it out (line 3)"),
        ("- answer: a\n\n- {}\n", "rule 2, answer: Field required (line 3)"),
        ("rules: {}\n", "rules: must be a list; begin each entry with '- ' (line 1)"),
        ("models: []\n", "models: must be a mapping of model to what it can do (line 1)"),
        ("rule:\n- answer: a\n", "rule: unknown; there can be: endpoint, models, troubles, rules (line 2)"),
        (
            "endpoint: {logprobs: maybe}\n",
            "endpoint, logprobs: Input should be 'reported', 'none' or 'refused' (line 1)",
        ),
        ("endpoint: {top_logprobs: 21}\n", "endpoint, top_logprobs: Input should be less than or equal to 20"),
        ("endpoint: 7\n", "endpoint, as a whole:"),
        ("models:\n  tiny: {obedience: true}\n", "models.tiny, obedience: Extra inputs are not permitted"),
        ("troubles:\n- {kind: slow}\n", "trouble 1: say when: calls: [1, 2], or every: 1 for always, or times: 1"),
        ("troubles:\n- {kind: slow, every: 1}\n- {kind: slw}\n", "trouble 2, as a whole: Input tag 'slw' found using"),
        ("troubles:\n- {kind: slow, calls: [0]}\n", "trouble 1, slow.calls.0: Input should be greater"),
        (
            "- probabilities: {a: 0.5, b: 0.6}\n",
            "the probabilities (with outside) sum to 1.1; make their sum 1 (line 1)",
        ),
        ("- probabilities: {a: 0.9}\n  outside: {b: 0.2}\n", "sum to 1.1"),
        ("- probabilities: {a: 1.5, b: -0.5}\n", "rule 1, probabilities.a: Input should be less than or equal to 1"),
        ("- probabilities: {a: much}\n", "rule 1, probabilities.a: Input should be a valid number"),
        ("- probabilities: {a: 1}\n  answer: b\n", "name one of them, or leave it out"),
        ("- probabilities: {a: 1, b: 0}\n  answer: b\n", "name one of them, or leave it out"),
        ("- probabilities: {}\n", "rule 1, answer: Field required"),
        ("- probabilities: [a]\n", "rule 1, answer: Field required"),
        ("- answer: a\n  outside: {b: 1}\n", "outside needs probabilities"),
        ("- probabilities: {? [a] : 1}\n", "cannot be read"),
        ("- answer: [\n", "line 2"),
    ],
)
def test_a_fault_is_told_with_file_entry_and_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    with pytest.raises(InvalidSetting) as refused:
        load_setup(path)
    assert str(refused.value).startswith(f"{path}")
    assert told in str(refused.value)


def test_all_faults_are_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("endpoint: {speed: 1}\nmodels:\n  m: 7\ntroubles:\n- {kind: x}\nrules:\n- 7\n- {}\n")
    with pytest.raises(InvalidSetting) as refused:
        load_setup(path)
    lines = str(refused.value).splitlines()
    assert [line.rpartition("(line ")[2] for line in lines] == ["1)", "3)", "5)", "7)", "8)"]


@pytest.mark.parametrize("given", [{"rules": [{"answer": "a", "x": 1}]}, [{"x": 1}]])
def test_what_is_given_wrongly_in_python_is_told_without_lines(given: Any) -> None:
    with pytest.raises(InvalidSetting) as refused:
        load_setup(given)
    assert "line" not in str(refused.value)


@pytest.mark.parametrize("text", re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE))
def test_the_files_of_the_docs_are_right(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    load_setup(path)


def test_the_docs_tell_every_name() -> None:
    kinds = [
        kind for trouble in get_args(get_args(Trouble)[0]) for kind in get_args(trouble.model_fields["kind"].annotation)
    ]
    assert len(kinds) == 17
    page = PAGE.read_text()
    assert [name for name in [*Traits.model_fields, *Rule.model_fields, *kinds] if f"`{name}`" not in page] == []
