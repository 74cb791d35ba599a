"""What the README tells a user to type, composes; what it says stands in the code, stands there."""

import re
import shlex
from pathlib import Path

import pytest

from alignpipe.compose.command_line import read_line
from alignpipe.compose.composition import compose
from alignpipe.compose.sweeps import compose_sweep
from alignpipe.config import KINDS
from tests.said import unsaid

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _commands() -> list[str]:
    """Every `alignpipe run` line, comments cut off."""
    lines = re.findall(r"^alignpipe run\b.*$", README, flags=re.MULTILINE)
    return sorted({line.partition("#")[0].strip() for line in lines})


def test_readme_shows_the_two_commands() -> None:
    assert "make demo" in README and "make test" in README
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo:", makefile, flags=re.MULTILINE) and re.search(
        r"^test:", makefile, flags=re.MULTILINE
    )


@pytest.mark.parametrize("command", _commands())
def test_command_of_the_readme_composes(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    words = shlex.split(command)[2:]
    if "-m" in words:
        assert compose_sweep(read_line(words)).words
        return
    composed = compose(words)
    assert composed.config.stage is not None or composed.config.pipeline is not None


def test_map_of_the_code_names_what_is_there() -> None:
    block = README.split("## The code", 1)[1].split("```")[1]
    named = re.findall(r"^  ([\w/.]+(?: [\w.]+\.py)*)  ", block + "  ", flags=re.MULTILINE)
    for name in " ".join(named).split():
        assert (ROOT / "alignpipe" / name).exists(), name


def test_every_pipeline_and_kind_is_in_the_readme() -> None:
    for path in (ROOT / "conf" / "pipeline").glob("*.yaml"):
        assert f"`{path.stem}`" in README
    assert all(re.search(rf"\b{kind}\b", README) for kind in KINDS)


def _features() -> list[tuple[str, str]]:
    """Words and test file of every row of the table of features."""
    table = README.split("## What each stage can do", 1)[1].split("\n## ", 1)[0]
    rows = [
        [cell.strip() for cell in line.split(" | ")] for line in table.splitlines() if line.startswith("| ")
    ]
    return [(row[2].strip("`"), row[3].strip("` |")) for row in rows if row[2].startswith("`")]


@pytest.mark.parametrize(("words", "tests"), _features())
def test_feature_of_the_readme_composes_and_has_its_tests(
    words: str, tests: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (ROOT / tests).is_file()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "my_reward.py").write_text(
        "def score(prompts, responses):\n    return [1.0 for _ in responses]\n"
    )
    typed = shlex.split(words)
    assert not unsaid(compose(typed), typed)


def test_table_of_features_has_rows_of_every_stage_that_learns() -> None:
    assert len(_features()) >= 20
