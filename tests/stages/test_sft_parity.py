"""The sft stage against TRL's SFTTrainer: same folder, file, order and learning rate, same loss at every step."""

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from alignpipe.config import SFTConfig, num_steps
from alignpipe.data.collate import collate
from alignpipe.data.encoding import encode_demonstrations
from alignpipe.data.examples import Example
from alignpipe.data.order import batches
from alignpipe.data.records import Demonstration, Message
from alignpipe.data.shares import in_share
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.losses.sft import sft_loss
from alignpipe.models.forward import batch_logprobs
from alignpipe.models.loading import ModelSource, load_policy
from alignpipe.toy.answers import make_demonstrations
from tests.project import Project

STEPS = 20
BATCH = 8
RATE = 2e-3


@pytest.fixture
def folder(make_llama: Callable[..., PreTrainedModel], tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A model folder as anybody would have it."""
    make_llama(initializer_range=0.06).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


def _records(number: int) -> list[Demonstration]:
    return [
        Demonstration((Message("user", asked), Message("assistant", said)))
        for asked, said in make_demonstrations(number, seed=5, quality=0.5)
    ]


def _our_losses(project: Project, folder: Path, data: Path) -> tuple[list[float], SFTConfig]:
    words = (
        "stage=sft",
        f"model={folder}",
        f"data={data}",
        "stage.max_steps=20",
        "stage.epochs=100",
        f"stage.batch_size={BATCH}",
        "stage.micro_batch_size=4",
        f"stage.learning_rate={RATE}",
        "stage.lr_schedule=constant",
        "stage.warmup_ratio=0",
        "stage.weight_decay=0.01",
        "stage.log_steps=1",
        "stage.num_samples=0",
        "stage.eval_rows=4",
        "stage.max_length=96",
        "stage.max_prompt_length=64",
        "stage.max_response_length=32",
    )
    config = project.compose(*words).config.stage
    assert isinstance(config, SFTConfig)
    lines = (project.run(*words) / "sft" / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line], config


def _their_losses(folder: Path, rows: list[Demonstration], output: Path) -> tuple[list[float], Any]:
    datasets = pytest.importorskip("datasets")
    trl = pytest.importorskip("trl")

    class Recording(trl.SFTTrainer):  # type: ignore[misc]
        """Keeps every loss, since the log rounds them."""

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            recorded.append(float(loss.detach()))
            return loss

    recorded: list[float] = []
    data = datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row.prompt[0].content}],
                "completion": [{"role": "assistant", "content": row.response}],
            }
            for row in rows
        ]
    )
    settings = trl.SFTConfig(
        output_dir=str(output),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // 2,
        gradient_accumulation_steps=2,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        adam_beta2=0.95,
        optim="adamw_torch",
        max_length=96,
        train_sampling_strategy="sequential",
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = Recording(
        model, args=settings, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(folder)
    )
    trainer.train()
    return [sum(recorded[at : at + 2]) for at in range(0, 2 * STEPS, 2)], trainer.train_dataset


def test_loss_curve_is_that_of_trl(
    project: Project, folder: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    records = _records(60)
    lines = [json.dumps({"prompt": row.prompt[0].content, "response": row.response}) for row in records]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(lines))
    ours, config = _our_losses(project, folder, data)
    rows = in_share(records, "train", config.data.shares)
    assert num_steps(config, len(rows)) == STEPS
    seen = [rows[i] for batch in islice(batches(config.seed, len(rows), BATCH), STEPS) for i in batch]
    theirs, encoded = _their_losses(folder, seen, tmp_path / "trl")
    # The template, the end of the turn and what is learnt are theirs too.
    mine = encode_demonstrations(seen, tokenizer, 96, "error").examples
    assert [row["input_ids"] for row in encoded] == [row.ids for row in mine]
    assert len(ours) == len(theirs) == STEPS
    assert ours[-1] < 0.8 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-4)


def _token_losses(
    policy: PreTrainedModel, rows: list[Example], pad_id: int, extra: int = 0
) -> list[torch.Tensor]:
    """The loss of every learnt token of each row; `extra` columns of padding."""
    batch = collate([*rows, Example([pad_id] * extra, [False] * extra)] if extra else rows, pad_id)
    with torch.no_grad():
        losses = sft_loss(batch_logprobs(policy, batch), batch.loss_mask[:, 1:])
    return [found[mask] for found, mask in zip(losses, batch.loss_mask[:, 1:], strict=True)][: len(rows)]


def test_token_losses_are_those_of_cross_entropy_in_float64(folder: Path, tokenizer: Tokenizer) -> None:
    policy = load_policy(ModelSource(str(folder)), tokenizer)
    rows = encode_demonstrations(_records(12), tokenizer, 96, "error").examples
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for row, found in zip(rows, _token_losses(policy, rows, tokenizer.pad_id), strict=True):
        ids = torch.tensor([row.ids])
        with torch.no_grad():
            logits = exact(input_ids=ids).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        torch.testing.assert_close(found.double(), losses[torch.tensor(row.mask[1:])], rtol=1e-6, atol=2e-6)


def test_padding_and_order_and_company_change_no_token_loss(folder: Path, tokenizer: Tokenizer) -> None:
    policy = load_policy(ModelSource(str(folder)), tokenizer)
    rows = encode_demonstrations(_records(9), tokenizer, 96, "error").examples
    whole = _token_losses(policy, rows, tokenizer.pad_id)
    alone = [_token_losses(policy, [row], tokenizer.pad_id)[0] for row in rows]
    turned = _token_losses(policy, rows[::-1], tokenizer.pad_id)[::-1]
    padded = _token_losses(policy, rows, tokenizer.pad_id, extra=100)
    for other in (alone, turned, padded):
        for one, same in zip(whole, other, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-6, atol=2e-6)


def test_padding_on_the_left_changes_no_token_loss(folder: Path, tokenizer: Tokenizer) -> None:
    """As transformers is called where somebody pads on the left, with mask and positions."""
    policy = load_policy(ModelSource(str(folder)), tokenizer)
    rows = encode_demonstrations(_records(6), tokenizer, 96, "error").examples
    width = max(row.num_tokens for row in rows) + 3
    ids = torch.tensor([[tokenizer.pad_id] * (width - row.num_tokens) + row.ids for row in rows])
    real = torch.tensor([[0] * (width - row.num_tokens) + [1] * row.num_tokens for row in rows])
    learnt = torch.tensor([[False] * (width - row.num_tokens) + row.mask for row in rows])[:, 1:]
    with torch.no_grad():
        positions = (real.cumsum(1) - 1).clamp(min=0)
        logits = policy(input_ids=ids, attention_mask=real, position_ids=positions).logits
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    for row, mask, found in zip(losses, learnt, _token_losses(policy, rows, tokenizer.pad_id), strict=True):
        torch.testing.assert_close(row[mask], found, rtol=1e-6, atol=2e-6)
