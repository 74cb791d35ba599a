"""Real files and a really pretrained model: each stage learns from them, and what they write opens elsewhere.

The model has 260 thousand weights and reads a text as 512 pieces of words, so most rows of the real files are
over its length; that they are dropped and counted is part of what is tried.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from alignpipe.compose.composition import compose
from alignpipe.pipeline.runner import run

pytestmark = pytest.mark.slow
MAX_RESPONSE = 200


def _run(outputs: Path, *words: str) -> Path:
    composed = compose([f"output_dir='{outputs}'", *words])
    run(composed.config, list(words), composed.yaml)
    return outputs / "runs" / (outputs / "latest").read_text().strip()


def _words(shared_data: Path, file: str, *words: str) -> list[str]:
    return [
        f"model='{shared_data / 'models' / 'stories260K'}'",
        f"data='{shared_data / 'data' / file}'",
        f"model.max_response_length={MAX_RESPONSE}",
        *words,
    ]


def _metrics(folder: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((folder / "alignpipe.json").read_text())["metrics"]
    return metrics


def _greedy(folder: Path, prompt: str, max_new_tokens: int = 24) -> torch.Tensor:
    """Ids that plain transformers generates; (T,)."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    with torch.inference_mode():
        generated: torch.Tensor = model.generate(ids, max_new_tokens=max_new_tokens, do_sample=False)
    return generated[0, ids.shape[1] :]


@pytest.mark.parametrize(
    ("file", "rows"),
    [("alpaca_roleplay.json", "data.max_rows=1000"), ("gsm8k_train.jsonl", "data.max_rows=400")],
)
def test_sft_lowers_the_loss_on_held_out_rows(
    shared_data: Path, tmp_path: Path, file: str, rows: str
) -> None:
    folder = _run(
        tmp_path,
        "stage=sft",
        *_words(shared_data, file, rows, "model.max_length=400", "model.max_prompt_length=200"),
        "stage.learning_rate=2e-3",
        "stage.batch_size=16",
        "stage.micro_batch_size=16",
        "stage.max_steps=10",
        "stage.epochs=4",
        "stage.eval_rows=1000",
        "stage.num_samples=1",
    )
    metrics = _metrics(folder / "sft")
    assert metrics["rows"] >= 16
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 0.2
    model = AutoModelForCausalLM.from_pretrained(folder / "sft")
    tokenizer = AutoTokenizer.from_pretrained(folder / "sft")
    stops = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (stops if isinstance(stops, list) else [stops])
    assert tokenizer.pad_token_id not in (stops if isinstance(stops, list) else [stops])
    assert len(_greedy(folder / "sft", "What is two and two?")) > 0


RM = ["model.max_length=256", "stage.learning_rate=5e-4", "stage.max_steps=30", "stage.epochs=2"]
# So small a model fits single pairs soon: a weak pull to the reference keeps its margins small.
DPO = [
    "data.shares={sft:0.2,preference:0.3,rl:0.2,eval:0.3}",
    "model.max_length=512",
    "stage.learning_rate=1e-4",
    "stage.beta=0.02",
    "stage.num_samples=1",
]


@pytest.mark.parametrize(("kind", "words"), [("rm", RM), ("dpo", DPO)])
def test_pairs_bring_the_held_out_loss_below_ln_2(
    shared_data: Path, tmp_path: Path, kind: str, words: list[str]
) -> None:
    folder = _run(
        tmp_path,
        f"stage={kind}",
        *_words(shared_data, "hh_harmless_pairs.jsonl"),
        *words,
        "stage.batch_size=16",
        "stage.micro_batch_size=16",
        "stage.eval_rows=1000",
    )
    assert _metrics(folder / kind)["eval_loss"] < math.log(2)
    rejected = [json.loads(line) for line in (folder / kind / "rejected.jsonl").read_text().splitlines()]
    reasons = {row["line"]: row["reason"] for row in rejected}
    assert len(reasons) == 6
    assert {line for line, reason in reasons.items() if "empty" in reason} == {335, 1013}
    if kind == "rm":
        model = AutoModelForSequenceClassification.from_pretrained(folder / kind)
        assert model.config.num_labels == 1
    else:
        assert len(_greedy(folder / kind, "Tell me a story.")) > 0


def test_whole_chain_runs_on_real_data(shared_data: Path, tmp_path: Path) -> None:
    pairs = shared_data / "data" / "hh_harmless_pairs.jsonl"
    settings = {
        "max_length": 400,
        "max_prompt_length": 200,
        # Long and fast enough that some responses end by themselves: rejection sampling keeps no others.
        "training.sft.learning_rate": 3e-3,
        "training.sft.epochs": 6,
        "training.sft.batch_size": 8,
        "training.sft.micro_batch_size": 8,
        "training.sft.eval_rows": 16,
        "training.sft.num_samples": 1,
        "training.rm.learning_rate": 1e-3,
        "training.rm.batch_size": 8,
        "training.rm.micro_batch_size": 8,
        "training.rm.eval_rows": 32,
        "training.rs.num_prompts": 16,
        "training.rs.num_samples": 4,
        "training.rs.learning_rate": 3e-4,
        "training.rs.batch_size": 8,
        "training.rs.eval_rows": 8,
        "training.ppo.num_rollouts": 2,
        "training.ppo.rollout_size": 8,
        "training.ppo.batch_size": 8,
        "training.ppo.learning_rate": 1e-4,
        "training.eval.num_prompts": 8,
    }
    folder = _run(
        tmp_path,
        "pipeline=llama2_style",
        "pipeline.order=[sft,rm,rs,ppo,eval]",
        *_words(shared_data, "alpaca_roleplay.json"),
        f"stages.rm.data='{pairs}'",
        "stages.rm.data.max_rows=150",
        *(f"model.{key}={value}" for key, value in settings.items()),
    )
    states = json.loads((folder / "scorecard.json").read_text())
    assert list(states["policies"]) == ["base", "sft", "rs", "ppo"]
    nothing = {"overall": None, "helpful": None, "truthful": None, "harmless": None, "ci95": None}
    for figures in states["policies"].values():
        assert figures["gold"] == nothing
        assert figures["prejudice"] is None
        assert all(math.isfinite(figures[name]) for name in ("reward", "kl", "length"))
    assert states["policies"]["sft"]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert 0 <= states["reward_model"]["accuracy"] <= 1
    assert states["reward_model"]["gold_accuracy"] is None
    assert _metrics(folder / "rs")["unanswered"] < 16

    # The responses that were learnt end; plain transformers ends them too, by its own generation settings.
    for name in ("sft", "rs", "ppo"):
        model, tokenizer = (
            kind.from_pretrained(folder / name) for kind in (AutoModelForCausalLM, AutoTokenizer)
        )
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": "You are a cat. Say hello."}],
            add_generation_prompt=True,
            return_tensors="pt",
        )["input_ids"]
        torch.manual_seed(0)
        with torch.inference_mode():
            rows = model.generate(
                ids, max_new_tokens=MAX_RESPONSE, do_sample=True, top_k=0, num_return_sequences=32
            )
        stops = torch.tensor(model.generation_config.eos_token_id).reshape(-1)
        ended = torch.isin(rows[:, ids.shape[1] :], stops).any(1)
        assert ended.float().mean() > 0.1
