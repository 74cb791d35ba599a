"""Supervised fine-tuning: the loss falls, the end of a turn is learnt, and which tokens are."""

import json
from pathlib import Path
from typing import Any

import pytest

from alignpipe.config import SFTConfig
from alignpipe.data.encoding import encode_demonstrations, encode_prompts, encode_texts
from alignpipe.data.records import Demonstration, Prompt, Text
from alignpipe.data.shares import in_share
from alignpipe.data.sources import DataSource, read_records
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.models.loading import ModelSource, load_policy
from alignpipe.rollout.generate import generate
from tests.project import Project


def _manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sft" / "alignpipe.json").read_text())
    return found


def _config(project: Project) -> SFTConfig:
    config = project.compose().config.stages["sft"]
    assert isinstance(config, SFTConfig)
    return config


def _demonstrations(project: Project) -> list[Demonstration]:
    records = read_records(DataSource("toy", "toy", _config(project).data), "demonstrations").records
    return [record for record in records if isinstance(record, Demonstration)]


def test_loss_falls_on_held_out_prompts(finished: Project) -> None:
    folder = finished.outputs / "runs" / (finished.outputs / "latest").read_text().strip()
    metrics = _manifest(folder)["metrics"]
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.5
    lines = [json.loads(line) for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]


def test_end_of_turn_is_learnt(project: Project, tokenizer: Tokenizer, architecture: Any) -> None:
    words = ("stage.epochs=24", "stage.num_samples=0", "stage.learning_rate=8e-3")
    folder = project.run("stage=sft", *words) / "sft"
    policy = load_policy(ModelSource(str(folder), None, architecture), tokenizer, "sdpa", "cpu")
    config = _config(project).data
    records = read_records(DataSource("toy", "toy", config), "prompts").records
    asked = in_share([r for r in records if isinstance(r, Prompt)], "eval", config.shares)
    prompts = encode_prompts(asked, tokenizer, 64, "error").examples
    assert len(prompts) > 20
    # Low enough to be greedy in all but name.
    samples = generate(
        policy,
        prompts,
        num_samples=1,
        max_new_tokens=48,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
        temperature=0.01,
        seed=0,
        batch_size=64,
    ).samples
    ended = [row[0].finished for row in samples]
    assert sum(ended) / len(ended) > 0.9
    # Ended by saying something, not by saying nothing.
    assert sum(len(row[0].ids) for row in samples) / len(samples) > 3


def test_last_learnt_token_is_the_end_of_the_turn(project: Project, tokenizer: Tokenizer) -> None:
    records = _demonstrations(project)
    encoded = encode_demonstrations(records, tokenizer, 128, "error")
    assert len(encoded.examples) == len(records)
    for record, example in zip(records, encoded.examples, strict=True):
        learnt = [token for token, mask in zip(example.ids, example.mask, strict=True) if mask]
        assert learnt[-1] == example.ids[-1] == tokenizer.turn_end_id
        assert tokenizer.decode(learnt[:-1]).split() == record.response.split()
        assert tokenizer.turn_end_id not in learnt[:-1]


def test_loss_on_all_learns_every_token_but_the_first(project: Project, tokenizer: Tokenizer) -> None:
    examples = encode_demonstrations(_demonstrations(project), tokenizer, 128, "error", "all").examples
    assert all(example.mask == [False] + [True] * (len(example.ids) - 1) for example in examples)


def test_texts_are_learnt_whole(tokenizer: Tokenizer) -> None:
    text = Text("The sky is blue. The grass is green. The sun is hot.")
    ids = [*tokenizer.encode_text(text.text), tokenizer.eos_id]
    examples = encode_texts([text], tokenizer, 6).examples
    assert len(examples) > 1
    learnt = [t for example in examples for t, mask in zip(example.ids, example.mask, strict=True) if mask]
    assert learnt == ids[1:]


def test_stage_trains_on_raw_text(copied: Project) -> None:
    folder = copied.run("stage=sft", "data.format=text", "stage.max_steps=12", "stage.num_samples=0")
    metrics = _manifest(folder)["metrics"]
    assert metrics["rows"] > 0
    assert metrics["eval_loss"] is None or metrics["eval_loss"] < metrics["eval_loss_before"]


def test_learning_rate_warms_up_and_ends_low(project: Project) -> None:
    words = ("stage.max_steps=10", "stage.warmup_ratio=0.3", "stage.log_steps=1", "stage.num_samples=0")
    folder = project.run("stage=sft", *words)
    lines = [json.loads(line) for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    peak = project.compose("stage=sft").config.stage
    assert isinstance(peak, SFTConfig)
    assert len(rates) == 10
    assert rates[0] < rates[1] < max(rates)
    assert max(rates) == pytest.approx(peak.learning_rate, rel=1e-6)
    assert rates[-1] < 0.1 * peak.learning_rate
