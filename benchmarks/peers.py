"""The peers' side of every case: TRL's trainers and transformers' samplers, at the settings that the case names.

At their best: no checkpointing, no logging, no saving, no progress bar; on a CPU float32 (bf16 is three times slower),
on a GPU bf16 over weights in float32 where they are trained, in bf16 alone where they are not.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    TrainerCallback,
)

from alignpipe.data.order import batches
from benchmarks.case import MAX_LENGTH, OPTIMIZER, SEED, SIZES, Job, Measured
from benchmarks.clock import Clock
from benchmarks.workload import POLICY, REWARD, ids_of, num_tokens, stop_ids

# Of continuous batching: tokens of a page of the cache, tokens of one forward at most.
PAGE, BATCH_TOKENS = 16, 512


class Marks(TrainerCallback):
    """Marks a clock where training begins and after every step."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Mark."""
        self._clock.mark()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Mark."""
        self._clock.mark()


def sft(job: Job) -> Measured:
    """SFTTrainer: padded in our order, grouped by length, or packed with as many tokens a step."""
    from trl import SFTConfig, SFTTrainer

    rows = ids_of(job.workload, "demonstrations")
    tokens, batch = num_tokens(job.workload, "demonstrations"), job.settings["batch_size"]
    columns = [{"input_ids": row["ids"], "completion_mask": list(map(int, row["mask"]))} for row in rows]
    settings: dict[str, Any] = {
        "completion_only_loss": True,
        "max_length": MAX_LENGTH,
        "dataset_num_proc": None,
    }
    way = job.settings["way"]
    if way == "packed":
        batch = max(1, math.ceil(batch * tokens / len(rows) / MAX_LENGTH))
        settings |= {"packing": True}
    elif way == "grouped":
        settings |= {"train_sampling_strategy": "group_by_length"}
    if way == "padded":
        columns = _in_our_order(columns, batch, job.repetitions + 1)
    epochs = 1 if way == "padded" else job.repetitions + 1
    config = SFTConfig(**_arguments(job, batch, epochs) | settings)
    return _train(job, SFTTrainer, tokens, model=_policy(job), args=config, train_dataset=columns)


def rm(job: Job) -> Measured:
    """RewardTrainer, padded, in our order, from the head that our stage draws."""
    from trl import RewardConfig, RewardTrainer

    pairs, batch = ids_of(job.workload, "pairs"), job.settings["batch_size"]
    columns = [
        {"chosen_ids": pair["prompt"] + pair["chosen"], "rejected_ids": pair["prompt"] + pair["rejected"]}
        for pair in pairs
    ]
    config = RewardConfig(**_arguments(job, batch, 1), max_length=None)
    rows = _in_our_order(columns, batch, job.repetitions + 1)
    return _train(
        job,
        RewardTrainer,
        num_tokens(job.workload, "pairs"),
        model=_scalar(job),
        args=config,
        train_dataset=rows,
    )


def dpo(job: Job) -> Measured:
    """DPOTrainer, padded, in our order; the reference in every step, or once before the clock begins."""
    from trl import DPOConfig, DPOTrainer

    class Encoded(DPOTrainer):
        """Takes ids as they are."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    pairs, batch = ids_of(job.workload, "pairs"), job.settings["batch_size"]
    columns = [
        {
            "prompt": "",
            "prompt_ids": pair["prompt"],
            "chosen_ids": pair["chosen"],
            "rejected_ids": pair["rejected"],
        }
        for pair in pairs
    ]
    config = DPOConfig(
        **_arguments(job, batch, 1),
        max_length=None,
        beta=0.1,
        precompute_ref_log_probs=job.settings["reference"] == "precomputed",
    )
    rows = _in_our_order(columns, batch, job.repetitions + 1)
    models = {"model": _policy(job), "ref_model": _policy(job, _dtype(job))}
    return _train(job, Encoded, num_tokens(job.workload, "pairs"), **models, args=config, train_dataset=rows)


def ppo(job: Job) -> Measured:
    """PPOTrainer of TRL 1.9.0, the last release that has one; a rollout with its updates a repetition."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    settings, clock = job.settings, Clock(job.device)
    size, length = settings["rollout_size"], settings["response_length"]
    arguments = _arguments(job, size, 1)
    config = PPOConfig(
        **arguments,
        total_episodes=size * (job.repetitions + 1),
        num_ppo_epochs=settings["epochs"],
        num_mini_batches=1,
        local_rollout_forward_batch_size=size,
        response_length=length,
        temperature=1.0,
        num_sample_generations=0,
    )
    tokenizer = AutoTokenizer.from_pretrained(job.workload / POLICY, padding_side="left")
    questions = ids_of(job.workload, "questions")[:size]
    rows = Dataset.from_list([{"input_ids": ids} for ids in questions])
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=_policy(job),
        ref_model=_policy(job, _dtype(job)),
        reward_model=_scalar(job, _dtype(job)),
        value_model=_scalar(job),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[Marks(clock)],
    )
    trainer.train()
    tokens = sum(map(len, questions)) + size * length
    return Measured(clock.repetitions(job.repetitions), [tokens] * job.repetitions, clock.peak)


def generate(job: Job) -> Measured:
    """`generate` on prompts sorted by length, so many sequences at a time."""
    settings = job.settings
    model, config = _policy(job, _dtype(job)).eval().to(job.device), _generation(job)
    prompts = sorted(ids_of(job.workload, settings["prompts"]), key=len)
    size = settings["batch_size"] // settings["num_samples"]
    parts = [prompts[start : start + size] for start in range(0, len(prompts), size)]

    def responses() -> Iterator[list[int]]:
        for part in parts:
            width = max(map(len, part))
            pads = [width - len(prompt) for prompt in part]
            ids = [[config.pad_token_id] * pad + prompt for pad, prompt in zip(pads, part, strict=True)]
            mask = [[0] * pad + [1] * (width - pad) for pad in pads]
            with torch.inference_mode():
                found = model.generate(
                    torch.tensor(ids, device=job.device),
                    attention_mask=torch.tensor(mask, device=job.device),
                    generation_config=config,
                )
            yield from found[:, width:].tolist()

    return _sampled(job, responses)


def generate_batch(job: Job) -> Measured:
    """`generate_batch`: continuous batching in transformers, which shares prompts among their samples."""
    model, config = _policy(job).eval(), _generation(job)
    prompts = ids_of(job.workload, job.settings["prompts"])
    # Left to itself it takes three fifths of all memory, and is no faster.
    lengths = [len(prompt) + job.settings["response_length"] for prompt in prompts]
    pages = job.settings["num_samples"] * sum(math.ceil(length / PAGE) for length in lengths)
    batching = ContinuousBatchingConfig(page_size=PAGE, num_blocks=pages, max_batch_tokens=BATCH_TOKENS)

    def responses() -> Iterator[list[int]]:
        # Without inference_mode: the tensors are written to by a thread that is not in it.
        found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
        yield from (output.generated_tokens for output in found.values())

    return _sampled(job, responses)


def _sampled(job: Job, responses: Any) -> Measured:
    """Time repetitions of sampling; what comes after a stop token counts for nothing."""
    clock, tokens, stops = Clock(job.device), [], set(_stops(job))
    expected = len(ids_of(job.workload, job.settings["prompts"])) * job.settings["num_samples"]
    clock.mark()
    for _ in range(job.repetitions + 1):
        found = list(responses())
        clock.mark()
        if len(found) != expected:
            raise RuntimeError(f"{len(found)} responses came where {expected} were asked for")
        tokens.append(sum(_length(ids, stops) for ids in found))
    return Measured(clock.repetitions(job.repetitions), tokens[1:], clock.peak)


def _length(ids: Sequence[int], stops: set[int]) -> int:
    """Tokens up to the first that stops, itself included."""
    return next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))


def _stops(job: Job) -> list[int]:
    return stop_ids(SIZES[job.size], job.settings["stop_every"])


def _generation(job: Job) -> GenerationConfig:
    settings = job.settings
    tokenizer = AutoTokenizer.from_pretrained(job.workload / POLICY)
    return GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=settings["response_length"],
        num_return_sequences=settings["num_samples"],
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_stops(job) or None,
    )


def _train(job: Job, trainer_class: Any, tokens: int, *, train_dataset: Any, **given: Any) -> Measured:
    """Train to the end, with every loss kept before the log would round it."""
    clock, losses = Clock(job.device), []

    class Recording(trainer_class):  # type: ignore[misc]
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            losses.append(float(loss.detach()))
            return loss

    trainer = Recording(
        **given,
        train_dataset=Dataset.from_list(train_dataset),
        processing_class=AutoTokenizer.from_pretrained(job.workload / POLICY),
        callbacks=[Marks(clock)],
    )
    trainer.train()
    return Measured(clock.repetitions(job.repetitions), [tokens] * job.repetitions, clock.peak, losses=losses)


def _arguments(job: Job, batch: int, epochs: int) -> dict[str, Any]:
    """What holds for every trainer."""
    micro_batch = min(batch, job.settings.get("micro_batch_size", batch))
    return {
        **OPTIMIZER,
        "output_dir": str(job.scratch),
        "num_train_epochs": epochs,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": batch // micro_batch,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "train_sampling_strategy": "sequential",
        "seed": SEED,
        "bf16": job.precision == "bf16",
        "use_cpu": job.device == "cpu",
        "gradient_checkpointing": False,
        "dataloader_pin_memory": job.device == "cuda",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _in_our_order(rows: Sequence[dict[str, Any]], batch: int, epochs: int) -> list[dict[str, Any]]:
    """The rows of every step of our stage, one step behind the other."""
    steps = batches(SEED, len(rows), batch)
    return [rows[index] for _ in range(epochs * len(rows) // batch) for index in next(steps)]


def _dtype(job: Job) -> torch.dtype:
    """Of weights that are not trained."""
    return torch.bfloat16 if job.precision == "bf16" else torch.float32


def _policy(job: Job, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    attention = job.settings.get("attention", "sdpa")
    return AutoModelForCausalLM.from_pretrained(
        job.workload / POLICY, dtype=dtype, attn_implementation=attention
    )


def _scalar(job: Job, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    attention = job.settings.get("attention", "sdpa")
    return AutoModelForSequenceClassification.from_pretrained(
        job.workload / REWARD, dtype=dtype, attn_implementation=attention
    )
