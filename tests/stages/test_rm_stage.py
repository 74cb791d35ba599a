"""The reward model of the finished chain: raw scores as plain transformers has them, and their normalisation."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from alignpipe.artifact import read_manifest
from alignpipe.config import RMConfig
from alignpipe.data.encoding import encode_demonstrations, encode_rankings
from alignpipe.data.examples import Example
from alignpipe.data.records import Demonstration, Message, Ranking, prompt_text
from alignpipe.data.shares import in_share
from alignpipe.data.sources import DataSource, read_records
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.evaluation.rewards import read_normalizer
from alignpipe.models.loading import ModelSource
from alignpipe.models.scalar_head import load_scalar_model
from alignpipe.rollout.score import response_scores
from tests.project import Project


def _folder(project: Project, name: str = "rm") -> Path:
    return project.outputs / "runs" / (project.outputs / "latest").read_text().strip() / name


def _config(project: Project) -> RMConfig:
    config = project.compose().config.stages["rm"]
    assert isinstance(config, RMConfig)
    return config


def _rankings(project: Project, share: str) -> list[Ranking]:
    config = _config(project).data
    source = DataSource("collect", str(_folder(project, "collect").resolve()), config)
    return in_share(read_records(source, "rankings").records, share, config.shares, "collect")


def _demonstrations(project: Project) -> list[Demonstration]:
    config = _config(project).demonstrations
    records = read_records(DataSource("toy", "toy", config), "demonstrations").records
    return in_share(records, "sft", config.shares)


def _examples(project: Project, tokenizer: Tokenizer) -> list[Example]:
    rows = encode_rankings(_rankings(project, "train"), tokenizer, 128, "drop").examples
    return [example for row in rows for example in row.examples][:24]


@pytest.mark.parametrize("size", [1, 8])
def test_raw_scores_are_those_of_plain_transformers(
    finished: Project, tokenizer: Tokenizer, architecture: object, size: int
) -> None:
    folder = _folder(finished)
    examples = _examples(finished, tokenizer)
    assert len({len(example.ids) for example in examples}) > 3
    ours = load_scalar_model(ModelSource(str(folder), None, architecture), tokenizer, "sdpa", "cpu")
    expected = response_scores(ours, examples, tokenizer.pad_id, batch_size=5)

    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    found = []
    for start in range(0, len(examples), size):
        rows = [torch.tensor(example.ids) for example in examples[start : start + size]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=plain.config.pad_token_id)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        with torch.inference_mode():
            found.append(plain(input_ids=ids, attention_mask=mask).logits.squeeze(1))
    assert torch.cat(found).tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert expected.std() > 0.01


def test_normalised_scores_of_demonstrations_have_mean_0_and_deviation_1(
    finished: Project, tokenizer: Tokenizer, architecture: object
) -> None:
    folder = _folder(finished)
    examples = encode_demonstrations(_demonstrations(finished)[:1000], tokenizer, 128, "drop").examples
    assert len(examples) > 50
    model = load_scalar_model(ModelSource(str(folder), None, architecture), tokenizer, "sdpa", "cpu")
    metrics = json.loads((folder / "alignpipe.json").read_text())["metrics"]
    raw = response_scores(model, examples, tokenizer.pad_id).double()
    normalised = (raw - metrics["reward_mean"]) / metrics["reward_std"]
    assert float(normalised.mean()) == pytest.approx(0.0, abs=1e-3)
    assert float(normalised.std(unbiased=False)) == pytest.approx(1.0, abs=1e-3)
    # What stands in the file is what every other stage applies.
    applied = response_scores(model, examples, tokenizer.pad_id, normalizer=read_normalizer(folder))
    assert applied.tolist() == pytest.approx(normalised.tolist(), abs=1e-4)
    assert abs(float(raw.std()) - 1) > 0.1


def test_held_out_prompts_are_not_trained_on(finished: Project) -> None:
    rankings = {share: _rankings(finished, share) for share in ("eval", "train")}
    held_out, trained = ({prompt_text(record) for record in rankings[share]} for share in ("eval", "train"))
    assert held_out
    assert not held_out & trained
    manifest = read_manifest(_folder(finished))
    assert manifest is not None
    assert 0 < manifest.metrics["rows"] <= len(rankings["train"])


def test_pairs_of_one_prompt_never_part(tmp_path: Path, copied: Project) -> None:
    # Ten pairs to each of forty prompts: a split by row would put most prompts on both sides.
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"How many is {number}?", "chosen": f"It is {number}.", "rejected": f"It is not {other}."}
        for number in range(40)
        for other in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = copied.run("stage=rm", "stage.policy=latest/sft", f"data='{path}'", "stage.max_steps=1")
    manifest = read_manifest(folder / "rm")
    assert manifest is not None
    shares = _config(copied).data.shares
    prompts = [
        Ranking((Message("user", f"How many is {number}?"),), ("a", "b"), (1, 2)) for number in range(40)
    ]
    assert manifest.metrics["pairs"] == 10 * len(in_share(prompts, "eval", shares))
    assert manifest.metrics["rows"] == 10 * len(in_share(prompts, "train", shares))


def test_without_demonstrations_the_best_responses_set_the_scale(tmp_path: Path, copied: Project) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"How many is {number}?", "chosen": f"It is {number}.", "rejected": "No."}
        for number in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = copied.run("stage=rm", "stage.policy=latest/sft", f"data='{path}'", "stage.max_steps=2")
    manifest = read_manifest(folder / "rm")
    assert manifest is not None
    assert manifest.metrics["reward_std"] > 0
    assert manifest.metrics["gold_accuracy"] is None
