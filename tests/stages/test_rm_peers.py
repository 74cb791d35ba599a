"""The rm stage against TRL 1.16's RewardTrainer: its loss on the same tensors, its loss curve, its accuracy."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from alignpipe.config import RMConfig
from alignpipe.data.encoding import encode_rankings
from alignpipe.data.examples import RankedExample
from alignpipe.data.order import batches
from alignpipe.data.shares import in_share
from alignpipe.data.sources import DataSource, read_records
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.evaluation.ranking import pair_report
from alignpipe.losses.rm import centering_losses, kwise_losses
from alignpipe.models.loading import ModelSource
from alignpipe.models.saving import save_model
from alignpipe.models.scalar_head import load_scalar_model
from alignpipe.rollout.score import response_scores
from tests.project import Project

trl = pytest.importorskip("trl", reason="TRL is of the test extra: pip install 'alignpipe[test]'")

STEPS, BATCH = 20, 4


@pytest.mark.parametrize(("margin", "centering"), [(False, None), (True, None), (True, 0.01), (False, 0.5)])
def test_pairwise_loss_margin_and_centering_are_those_of_trl(margin: bool, centering: float | None) -> None:
    torch.manual_seed(0)
    chosen, rejected, margins = torch.randn(16) * 3, torch.randn(16) * 3, torch.rand(16)
    gather = SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=centering),
        accelerator=gather,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    logits = torch.cat([chosen, rejected])[:, None]
    inputs: dict[str, Any] = {"margin": margins} if margin else {}
    theirs = trl.RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), inputs)

    scores = torch.stack([chosen, rejected], dim=1).flatten()
    groups = torch.arange(16).repeat_interleave(2)
    ranks = torch.tensor([1.0, 2.0]).repeat(16)
    worths = torch.stack([margins, torch.zeros(16)], dim=1).flatten() if margin else None
    ours = kwise_losses(scores, ranks, groups, worths=worths)
    ours = ours + (centering or 0.0) * centering_losses(scores, ranks, groups)
    assert ours.mean().item() == pytest.approx(theirs.item(), abs=1e-6)


@pytest.fixture
def language_model(make_llama: Callable[..., PreTrainedModel], tokenizer: Tokenizer, tmp_path: Path) -> Path:
    save_model(make_llama(initializer_range=0.06), tokenizer, tmp_path / "lm")
    return tmp_path / "lm"


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Pairs of unlike lengths with a margin each."""
    rows = [
        {
            "prompt": f"How many is {n}?",
            "chosen": f"It is {n}." + " That is all." * (n % 3),
            "rejected": "No." if n % 2 else f"It is not {n + 1} and nobody asked.",
            "margin": n % 4 / 4,
        }
        for n in range(60)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _ours(project: Project, *words: str) -> list[float]:
    """The loss of each step of the whole stage."""
    lines = (project.run(*words) / "rm" / "metrics.jsonl").read_text().splitlines()
    return [figures["loss"] for figures in map(json.loads, lines) if "loss" in figures]


def _theirs(folder: Path, rows: list[RankedExample], out: Path, config: RMConfig) -> tuple[Any, list[float]]:
    """TRL's trainer after training on the same pairs in the same order, and the loss of each step."""
    from datasets import Dataset  # noqa: PLC0415  only here, and it takes a second

    losses: list[float] = []

    class Recorder(trl.RewardTrainer):  # type: ignore[misc, name-defined]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float((loss[0] if isinstance(loss, tuple) else loss).detach()))
            return loss

    trainer = Recorder(
        model=AutoModelForSequenceClassification.from_pretrained(folder),
        processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_list([_columns(row) for row in rows]),
        # What differs by default: mixed precision, order, schedule, decay of the moments, epsilon, and checkpointing.
        args=trl.RewardConfig(
            output_dir=str(out),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=2,
            learning_rate=config.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=0,
            adam_beta1=config.adam_beta1,
            adam_beta2=config.adam_beta2,
            adam_epsilon=config.adam_epsilon,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            center_rewards_coefficient=config.centering,
            train_sampling_strategy="sequential",
            max_length=None,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    return trainer, losses[:STEPS]


def _columns(row: RankedExample) -> dict[str, Any]:
    chosen, rejected = (example.ids for example in row.examples)
    return {"chosen_ids": chosen, "rejected_ids": rejected, "margin": row.margin}


def test_whole_stage_has_trls_loss_curve_and_counts_where_trl_averages(
    language_model: Path, pairs: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    project = Project(tmp_path / "outputs")
    words = (
        "stage=rm",
        f"stage.policy='{language_model}'",
        f"data='{pairs}'",
        "stage.margin=column",
        "stage.centering=0.01",
        f"stage.batch_size={BATCH}",
        "stage.micro_batch_size=2",
        f"stage.max_steps={STEPS}",
        "stage.epochs=10",
        "stage.learning_rate=1e-3",
        "stage.lr_schedule=linear",
        "stage.warmup_ratio=0",
        "stage.min_lr_ratio=0",
        "stage.log_steps=1",
        "stage.stress_rows=0",
    )
    config = project.compose(*words).config.stage
    assert isinstance(config, RMConfig)
    ours = _ours(project, *words)

    records = read_records(DataSource("file", str(pairs), config.data), "rankings").records
    rows = encode_rankings(
        in_share(records, "train", config.data.shares), tokenizer, config.max_length, "drop"
    ).examples
    order = batches(config.seed, len(rows), BATCH)
    seen = [rows[index] for _ in range(STEPS) for index in next(order)]
    start = load_scalar_model(ModelSource(str(language_model)), tokenizer, seed=config.seed)
    save_model(start, tokenizer, tmp_path / "start")
    trainer, theirs = _theirs(tmp_path / "start", seen, tmp_path / "trl", config)
    assert len(ours) == len(theirs) == STEPS
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[-1] < 0.7 * ours[0]

    # Two pairs in one batch and one in the next, which is wrong: TRL's accuracy is the mean of the batches' 1 and 0.
    model = trainer.model.eval()
    scores = [response_scores(model, row.examples, tokenizer.pad_id).tolist() for row in rows]
    right = [row for row, (won, lost) in zip(rows, scores, strict=True) if won > lost][:3]
    held_out = [*right[:2], _swapped(right[2])]
    from datasets import Dataset  # noqa: PLC0415

    found = trainer.evaluate(Dataset.from_list([_columns(row) for row in held_out]))
    assert found["eval_accuracy"] == pytest.approx(0.5)
    mine = [response_scores(model, row.examples, tokenizer.pad_id).tolist() for row in held_out]
    assert pair_report(held_out, mine)["accuracy"] == pytest.approx(2 / 3)


def _swapped(row: RankedExample) -> RankedExample:
    return RankedExample(row.examples[::-1], row.ranks, row.gold, row.prompt_length, row.margin)
