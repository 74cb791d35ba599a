"""Supervised fine-tuning: the loss falls, the end of a turn is learnt, and which tokens are."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from alignpipe.config import SFTConfig
from alignpipe.data.encoding import encode_demonstrations, encode_prompts, encode_texts
from alignpipe.data.records import Demonstration, Prompt, Text
from alignpipe.data.shares import in_share
from alignpipe.data.sources import DataSource, read_records
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import ConfigError
from alignpipe.models.loading import ModelSource, load_policy
from alignpipe.pipeline.plan import make_plan
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
    )
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


def test_selected_rows_are_trained_on_and_every_row_has_its_reason(copied: Project) -> None:
    words = (
        "stage=sft",
        "stage.selection.method=ifd",
        "stage.selection.diversity=kcenter",
        "stage.selection.keep=0.2",
        "stage.selection.min_tokens=7",
        "stage.selection_model=latest/sft",
        "stage.num_samples=0",
        "stage.max_steps=2",
        "stage.neftune_alpha=5",
    )
    planned = make_plan(copied.compose(*words).config).rows[0].rows
    folder = copied.run(*words)
    metrics = _manifest(folder)["metrics"]
    lines = [json.loads(line) for line in (folder / "sft" / "selection.jsonl").read_text().splitlines()]
    kept = [line for line in lines if line["kept"]]
    assert len(kept) == metrics["rows"] == metrics["selection_kept"] == planned == round(0.2 * len(lines))
    reasons = Counter(line["reason"] for line in lines if not line["kept"])
    assert {"too_short", "covered", "below_keep"} <= reasons.keys()
    assert {f"selection_{reason}": count for reason, count in reasons.items()} == {
        name: count
        for name, count in metrics.items()
        if name.startswith("selection_") and name != "selection_kept"
    }
    # The best twice as many by IFD are the pool, none of 1 or more is kept, and what was refused was not scored.
    ranked = sorted(line["score"] for line in lines if line.get("score", 2.0) < 1)
    assert all(ranked[-2 * len(kept)] <= line["score"] < 1 for line in kept)
    assert all(("score" in line) == (line.get("reason") != "too_short") for line in lines)
    assert all(line["place"] == f"toy:{int(line['place'].split(':')[1])}" for line in lines)


def test_epoch_is_chosen_by_the_reward_of_responses(copied: Project) -> None:
    words = (
        "stage.select_epoch=reward",
        "stage.reward_model=latest/rm",
        "stage.epochs=2",
        "stage.eval_rows=12",
    )
    metrics = _manifest(copied.run("stage=sft", "stage.num_samples=0", *words))["metrics"]
    rewards = [epoch["reward"] for epoch in metrics["epochs"]]
    assert len(rewards) == 2 and rewards[0] != rewards[1]
    assert metrics["best_epoch"] == 1 + rewards.index(max(rewards))
    best = metrics["epochs"][metrics["best_epoch"] - 1]
    # What is held out was measured again, on the weights that were put back.
    assert metrics["eval_loss"] == best["loss"]


def test_rows_over_length_are_counted_in_the_figures(finished: Project, project: Project) -> None:
    words = ("stage=sft", "stage.max_length=24", "stage.max_prompt_length=12", "stage.max_response_length=8")
    few = ("stage.max_steps=1", "stage.num_samples=0", "stage.eval_rows=0")
    cut = _manifest(project.run(*words, *few, "stage.data.on_overflow=cut"))["metrics"]
    dropped = _manifest(project.run(*words, *few))["metrics"]
    assert cut["rows_cut"] == dropped["rows_dropped"] > 0
    assert (cut["rows_dropped"], dropped["rows_cut"]) == (0, 0)
    assert cut["rows"] == dropped["rows"] + dropped["rows_dropped"]
    chain = finished.outputs / "runs" / (finished.outputs / "latest").read_text().strip()
    for name in ("sft", "rm", "rs", "ppo"):
        metrics = json.loads((chain / name / "alignpipe.json").read_text())["metrics"]
        assert (metrics["rows_cut"], metrics["rows_dropped"]) == (0, 0), name


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stage.select_epoch=reward"], "stage.reward_model: select_epoch=reward needs one"),
        (["stage.selection.method=reward"], "stage.reward_model: selection.method=reward needs one"),
        (["stage.selection.keep=0.3"], "stage.selection.keep: 0.3 of the rows, chosen by what?"),
        (["stage.selection.scripts=[latn]"], "Did you mean latin"),
        (["stage.selection.min_tokens=9", "stage.selection.max_tokens=3"], "9 is more than max_tokens 3"),
        (["stage.select_epoch=loss", "stage.eval_rows=0"], "looks at held-out rows"),
        (["stage.loss_on=lst"], "Did you mean last"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(project: Project, words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        project.compose("stage=sft", *words)


def test_selection_of_raw_text_is_refused_in_the_plan(project: Project) -> None:
    config = project.compose("stage=sft", "data.format=text", "stage.selection.drop_duplicates=true").config
    with pytest.raises(ConfigError, match="selection takes demonstrations"):
        make_plan(config)


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
