"""The dpo stage on small real runs: TRL's loss curve, invariants of every loss, what is read, dropped and kept."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Sampler, SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from alignpipe.config import PREFERENCE_LOSSES, ArchitectureConfig
from alignpipe.data.comparisons import compare
from alignpipe.data.embedded import read_world
from alignpipe.data.encoding import encode_rankings
from alignpipe.data.order import batches, order
from alignpipe.data.records import Ranking, prompt_text
from alignpipe.data.shares import in_share, share_of
from alignpipe.data.sources import DataSource, read_records
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.models.loading import ModelSource, load_policy
from alignpipe.models.saving import save_model
from alignpipe.training.context import Context
from tests.project import Project
from tests.stopping import stopped_at_the_first_save

NUM_ROWS = 60
STEP = ("stage.log_steps=1", "stage.num_samples=0", "stage.eval_rows=8")


@pytest.fixture(scope="module")
def rankings() -> list[Ranking]:
    """Rankings of two to four demonstrations each, of unequal length."""
    data = Project(Path("unused")).compose("stage=dpo", f"data.max_rows={NUM_ROWS}").config.data
    return [record for record in read_world(data, "rankings") if isinstance(record, Ranking)]


@pytest.fixture
def policy(make_llama: Callable[..., PreTrainedModel], tokenizer: Tokenizer, tmp_path: Path) -> Path:
    """A folder with a model whose log-probs vary."""
    folder = tmp_path / "policy"
    save_model(make_llama(), tokenizer, folder, None)
    return folder


def _pairs_file(rankings: list[Ranking], folder: Path) -> Path:
    path = folder / "pairs.jsonl"
    rows = [
        {"prompt": prompt_text(row), "chosen": row.responses[row.best], "rejected": row.responses[other]}
        for row in rankings
        if (other := next((i for i, rank in enumerate(row.ranks) if rank > row.ranks[row.best]), None))
        is not None
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _unpaired_file(rankings: list[Ranking], folder: Path) -> Path:
    path = folder / "unpaired.jsonl"
    rows = [
        {"prompt": prompt_text(row), "completion": response, "label": rank == 1}
        for row in rankings
        for response, rank in zip(row.responses[:2], row.ranks[:2], strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _run(folder: Path, data: Path, policy: Path | str, *words: str) -> Path:
    given = ("stage=dpo", f"data='{data}'", f"stage.policy='{policy}'", *STEP, *words)
    return Project(folder / "outputs").run(*given) / "dpo"


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _losses(folder: Path) -> list[float]:
    return [line["loss"] for line in _lines(folder) if "loss" in line]


def _metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "alignpipe.json").read_text())["metrics"]
    return metrics


def _apart(one: Path, other: Path) -> float:
    """The largest difference between the weights of two checkpoints."""
    mine, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    return max(float((mine[name] - theirs[name]).abs().max()) for name in mine)


def _often(fast: tuple[str, ...], slow: tuple[str, ...]) -> list[Any]:
    """One of each shape always; the others, alike but for a formula that is tested by itself, among the slow ones."""
    return [*fast, *(pytest.param(loss, marks=pytest.mark.slow) for loss in slow)]


@pytest.mark.parametrize("loss", _often(("sigmoid",), ("ipo", "apo_zero")))
def test_loss_curve_is_that_of_trls_trainer(
    loss: str, rankings: list[Ranking], policy: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Float32, AdamW (0.9, 0.95, 1e-8), no decay, constant rate, clipping at 1, batches of 8 in one forward."""
    pytest.importorskip("trl", minversion="1.16", reason="TRL is a test-only extra")
    from datasets import Dataset  # noqa: PLC0415
    from trl import DPOConfig, DPOTrainer  # noqa: PLC0415

    class InOrder(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Sampler[int]:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    data = _pairs_file(rankings, tmp_path)
    words = [
        "lr_schedule=constant",
        "warmup_ratio=0",
        "learning_rate=1e-3",
        "batch_size=8",
        "micro_batch_size=8",
    ]
    words += ["max_steps=20", "epochs=9", f"loss={loss}"]
    ours = _losses(_run(tmp_path, data, policy, *(f"stage.{word}" for word in words)))

    config = Project(tmp_path / "outputs").compose("stage=dpo", f"data='{data}'").config
    assert config.stage is not None
    records = read_records(DataSource("file", str(data), config.stage.data), "rankings").records
    pairs = compare(
        encode_rankings(in_share(records, "train", config.data.shares), tokenizer, 128, "drop").examples,
        "all",
    )
    steps = batches(config.stage.seed, len(pairs), 8)
    rows = []
    for pair in (pairs[index] for _ in range(20) for index in next(steps)):
        assert pair.chosen is not None and pair.rejected is not None
        start = pair.chosen.example.mask.index(True)
        chosen, rejected = pair.chosen.example.ids, pair.rejected.example.ids
        assert chosen[:start] == rejected[:start]
        row = {"prompt_ids": chosen[:start], "chosen_ids": chosen[start:], "rejected_ids": rejected[start:]}
        rows.append({"prompt": "", **row})
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(policy),
        ref_model=AutoModelForCausalLM.from_pretrained(policy),
        processing_class=AutoTokenizer.from_pretrained(policy),
        train_dataset=Dataset.from_list(rows),
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            loss_type=[loss],
            beta=0.1,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            adam_beta2=0.95,
            per_device_train_batch_size=8,
            max_steps=20,
            logging_steps=1,
            max_length=None,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
    )
    trainer.train()
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(ours) == len(theirs) == 20
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert ours[0] == pytest.approx({"sigmoid": math.log(2), "ipo": 25.0, "apo_zero": 1.0}[loss], abs=1e-5)
    assert ours[-1] < 0.9 * ours[0]


FAST = ("simpo",)


@pytest.mark.parametrize("loss", _often(FAST, tuple(loss for loss in PREFERENCE_LOSSES if loss not in FAST)))
def test_micro_batch_changes_nothing(
    loss: str, rankings: list[Ranking], policy: Path, tmp_path: Path
) -> None:
    # Rows of unlike length in one forward: padding is tried with it.
    words = (f"stage.loss={loss}", "stage.sft_coef=0.2", "stage.max_steps=2", "stage.batch_size=8")
    # AdamW divides by the size of a gradient; so large an epsilon keeps it from making much of the last bits.
    words += ("stage.adam_epsilon=1", "stage.warmup_ratio=0", "stage.learning_rate=0.01")
    data = _pairs_file(rankings, tmp_path)
    found = [
        _run(tmp_path / size, data, policy, *words, f"stage.micro_batch_size={size}") for size in ("8", "2")
    ]
    assert _losses(found[0]) == pytest.approx(_losses(found[1]), rel=1e-6, abs=1e-6)
    assert len(_losses(found[0])) == 2 and _apart(found[0], policy) > 0
    assert _apart(*found) < 1e-6


@pytest.mark.parametrize("size", [8, 1])
def test_kto_baseline_is_that_of_the_whole_step(
    size: int,
    rankings: list[Ranking],
    policy: Path,
    tokenizer: Tokenizer,
    architecture: ArchitectureConfig,
    tmp_path: Path,
) -> None:
    # The reference is another model, so that the baseline is far above 0 from the first step on.
    data = _unpaired_file(rankings, tmp_path)
    words = (f"stage.reference='{policy}'", "stage.loss=kto", "stage.max_steps=1", "stage.batch_size=8")
    found = _losses(_run(tmp_path, data, "base", *words, f"stage.micro_batch_size={size}"))

    config = Project(tmp_path / "outputs").compose("stage=dpo", f"data='{data}'").config
    assert config.stage is not None
    records = read_records(DataSource("file", str(data), config.stage.data), "unpaired").records
    records = in_share(records, "train", config.data.shares)
    prompts, responses = zip(
        *(tokenizer.encode_responses(record.prompt, (record.response,)) for record in records), strict=True
    )
    first = next(batches(config.stage.seed, len(records), 8))
    circle = list(order(config.stage.seed, 0, len(records)))
    others = []
    for row in first:
        place = circle.index(row)
        later = [circle[(place + step) % len(circle)] for step in range(1, len(circle))]
        others.append(next(other for other in later if prompts[other] != prompts[row]))
    models = [
        load_policy(ModelSource("tiny", None, architecture), tokenizer, "sdpa", "cpu"),
        AutoModelForCausalLM.from_pretrained(policy),
    ]
    own, mismatched = (
        [_logprob(models[0], *row) - _logprob(models[1], *row) for row in rows]
        for rows in (
            [(prompts[i], responses[i][0]) for i in first],
            [(prompts[i], responses[j][0]) for i, j in zip(first, others, strict=True)],
        )
    )
    baseline = sum(mismatched) / 8
    assert baseline > 1
    signs = [1 if records[i].desirable else -1 for i in first]
    assert {1, -1} == set(signs)
    expected = [
        1 - 1 / (1 + math.exp(-0.1 * sign * (ratio - baseline)))
        for sign, ratio in zip(signs, own, strict=True)
    ]
    assert found == [pytest.approx(sum(expected) / 8, abs=1e-5)]


def _logprob(model: PreTrainedModel, prompt: list[int], response: list[int]) -> float:
    """Log-prob of a response, one sequence at a time."""
    ids = torch.tensor([prompt + response])
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(logprobs[len(prompt) - 1 + i, token].item() for i, token in enumerate(response))


def test_stopped_stage_reads_the_reference_back_and_ends_the_same(
    rankings: list[Ranking],
    policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = _pairs_file(rankings, tmp_path)
    words = ("stage.loss=kto", "stage.max_steps=3", "stage.save_steps=2", "stage.batch_size=8")
    whole = _run(tmp_path / "whole", data, policy, *words)
    # The policy is its reference yet: neither good nor bad responses have moved, and nobody is warned.
    first = _lines(whole)[0]
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert first["logps/chosen_ratio"] == pytest.approx(0.0, abs=1e-6)
    assert first["logps/chosen"] < -1 and first["logps/rejected"] < -1
    assert "nats a token" not in capsys.readouterr().err
    loaded: list[str] = []
    load = Context.load_policy

    def loading(context: Context, role: str, *given: Any, **named: Any) -> PreTrainedModel:
        loaded.append(role)
        return load(context, role, *given, **named)

    monkeypatch.setattr(Context, "load_policy", loading)
    with stopped_at_the_first_save():
        _run(tmp_path / "cut", data, policy, *words)
    assert loaded == ["reference", "reference", "policy"]
    cut = _run(tmp_path / "cut", data, policy, *words)
    assert loaded[3:] == ["policy"]
    assert _apart(whole, cut) == 0.0
    assert _losses(whole) == _losses(cut)


def test_sides_equal_once_they_are_cut_are_dropped_and_counted(policy: Path, tmp_path: Path) -> None:
    long = "one two three four five six seven eight nine ten " * 4
    rows = [{"prompt": f"Say {i}.", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(20)]
    twins = [{"prompt": f"Tell {i}.", "chosen": long + "a", "rejected": long + "b"} for i in range(10)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + twins))
    words = ("stage.max_length=24", "stage.data.on_overflow=cut", "stage.max_steps=1")
    metrics = _metrics(_run(tmp_path, path, policy, *words))
    shares = Project(tmp_path).compose("stage=dpo").config.data.shares
    kept, lost = (sum(share_of(row["prompt"], shares) != "eval" for row in part) for part in (rows, twins))
    assert (metrics["rows"], metrics["dropped"]) == (kept, lost)
    assert lost > 5


def test_fast_falling_chosen_responses_are_told(
    rankings: list[Ranking], policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("stage.max_steps=8", "stage.learning_rate=1e-1")
    last = _lines(_run(tmp_path, _pairs_file(rankings, tmp_path), policy, *words))[-1]
    told = capsys.readouterr().err
    assert last["eval/logps/chosen_ratio"] < -1
    assert f"chosen responses lost {-last['eval/logps/chosen_ratio']:.1f} nats a token" in told


def test_simpo_opens_no_reference_whatever_is_named(
    rankings: list[Ranking], policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _pairs_file(rankings, tmp_path)
    folder = _run(tmp_path, data, policy, "stage.loss=simpo", "stage.max_steps=1", "stage.reference=null")
    inputs = json.loads((folder / "alignpipe.json").read_text())["inputs"]
    assert list(inputs["models"]) == ["policy"]
    capsys.readouterr()
    _run(tmp_path, data, policy, "stage.loss=simpo", "stage.max_steps=1", "stage.reference=base")
    assert Project(tmp_path / "outputs").states() == {"dpo": "reused"}
    assert "loss=simpo has no reference, so reference=base is not opened" in capsys.readouterr().err
