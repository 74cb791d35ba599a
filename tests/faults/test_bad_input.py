"""Bad input is told in one line with its exit code, before anything is trained or overwritten."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from alignpipe import cli
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.models.saving import save_model
from tests.project import SMALL

GOOD = json.dumps({"prompt": "Question?", "completion": "Answer."}) + "\n"


@pytest.fixture
def call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs `alignpipe run` in an empty folder; exit code, and the one line on standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["alignpipe", "run", *SMALL, *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        told = capsys.readouterr().err.strip()
        assert len(told.splitlines()) == 1, told
        assert told.startswith("error: ")
        assert not (tmp_path / "outputs" / "stages").exists()
        assert not (tmp_path / "outputs" / "runs").exists()
        return int(str(stopped.value.code)), told

    return run


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "rows.jsonl"),
        (GOOD.encode() * 3 + b'{"prompt": "caf\xe9", "completion": "x"}\n', "rows.jsonl:4"),
        (GOOD.encode() * 2 + b'{"prompt": \n' + GOOD.encode(), "rows.jsonl:3"),
        (b'{"colour": "red", "shape": "round"}\n', "rows.jsonl:1"),
    ],
    ids=["empty", "not UTF-8", "broken JSON", "no columns"],
)
def test_broken_data_file_is_named_with_its_line(
    call: Callable[..., tuple[int, str]], tmp_path: Path, content: bytes, told: str
) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    code, line = call("stage=sft", "data=rows.jsonl")
    assert code == 3, line
    assert told in line


def test_missing_data_file_names_the_nearest(call: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(GOOD)
    code, line = call("stage=sft", "data=./rowz.jsonl")
    assert code == 3
    assert "rows.jsonl?" in line


def test_half_written_weights_are_refused_before_any_stage(
    call: Callable[..., tuple[int, str]],
    tmp_path: Path,
    make_llama: Callable[..., PreTrainedModel],
    tokenizer: Tokenizer,
) -> None:
    save_model(make_llama(), tokenizer, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    for words in (["stage=sft", "model=./model"], ["stages.ppo.policy=./model"]):
        code, line = call(*words)
        assert code == 4, line
        assert "model.safetensors: cut short or damaged" in line


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("stages.ppo.kl_coeff=0.1", "stages.ppo.kl_coef"),
        ("stage=stf", "sft"),
        ("pipeline=lama2_style", "llama2_style"),
        ("pipeline.order=[sft,colect]", "collect"),
        ("stages.ppo.policy=rss", "rs"),
        ("stages.ppo.kl_controller=adaptve", "adaptive"),
        ("data=toi", "toy"),
    ],
)
def test_unknown_word_gets_the_nearest(call: Callable[..., tuple[int, str]], word: str, nearest: str) -> None:
    code, line = call(word)
    assert code == 2, line
    assert f"Did you mean {nearest}" in line
