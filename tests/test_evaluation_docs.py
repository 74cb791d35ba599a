"""What docs/evaluation.md shows: its commands compose, its table has every figure, its templates can be read."""

import json
import re
import shlex
from pathlib import Path

import pytest

from alignpipe.compose.composition import compose
from alignpipe.config import EvalConfig
from alignpipe.data.counterfactuals import read_templates
from alignpipe.objective import POLICY_FIGURES
from alignpipe.pipeline.graph import stages_of
from tests.said import unsaid

TEXT = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
COMMANDS = [line.partition("#")[0].strip() for line in re.findall(r"^alignpipe run\b.*$", TEXT, re.MULTILINE)]
TEMPLATES = re.findall(r'^\{"prompt".*$', TEXT, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "held_out.txt").write_text("A document.\n")
    words = shlex.split(command)[2:]
    composed = compose(words)
    assert not unsaid(composed, words)
    stages, order = stages_of(composed.config)
    assert any(isinstance(stages[name], EvalConfig) for name in order)


def test_table_names_every_figure_and_no_other() -> None:
    rows = re.findall(r"^\| (`.*?) \|", TEXT, re.MULTILINE)
    named = [figure for row in rows for figure in re.findall(r"`([\w.]+)`", row)]
    # The terms have the names of the user's own reward models.
    assert sorted(named) == sorted([*POLICY_FIGURES, "reward_terms"])


def test_templates_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "templates.jsonl"
    path.write_text("\n".join(TEMPLATES) + "\n")
    found = read_templates(path, ["Velns", "Orbans", "Tamis"])
    assert [len(template.groups) for template in found] == [3, 3, 2]
    assert found[0].response == json.loads(TEMPLATES[0])["response"]
