"""Memory is what the stages hold: cut as the strategy cuts it, at the peak that a real process reaches."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from alignpipe.compose.composition import compose
from alignpipe.config import ACCELERATORS, Config
from alignpipe.data.collate import collate
from alignpipe.data.examples import Example
from alignpipe.data.packing import lay_out
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import CheckpointError
from alignpipe.losses.logprobs import BLOCK_ELEMENTS, KEPT_ELEMENTS
from alignpipe.models.attention import SHORT as PADDED
from alignpipe.models.attention import allow_packing
from alignpipe.models.feed_forward import keep_gate_and_up
from alignpipe.models.forward import body_states
from alignpipe.models.saving import save_model
from alignpipe.pipeline.accelerators import TABLE, find_machine
from alignpipe.pipeline.activations import (
    BLOCK,
    KEPT_LOGITS,
    SHORT,
    Batch,
    Role,
    Setting,
)
from alignpipe.pipeline.advice import smallest_change
from alignpipe.pipeline.architecture import Architecture, parse_architecture, read_architecture
from alignpipe.pipeline.counts import Rows, count_rows
from alignpipe.pipeline.estimate import decided, estimate
from alignpipe.pipeline.heaviest import Length
from alignpipe.pipeline.memory import (
    PARTS,
    Memory,
    Work,
    peak,
    training_batches,
    training_moments,
)
from alignpipe.pipeline.moments import stage_moments
from alignpipe.pipeline.plan import make_plan
from benchmarks.memory import CASES, Case, build, estimated, measured
from tests.project import Project

SHAPES = Path(__file__).parents[2] / "docs" / "shapes"
TOLERANCE = 0.15


@pytest.fixture(scope="module")
def shape() -> Architecture:
    found, _ = read_architecture(SHAPES / "llama-2-7b")
    assert found is not None
    return found


@cache
def _composed(kind: str) -> Config:
    needs = ["stage.reward_model=x"] if kind in ("rs", "ppo", "eval") else []
    needs += ["stage.reference=base"] if kind == "eval" else []
    return compose([f"stage={kind}", f"model={SHAPES}/llama-2-7b", *needs]).config


def _stage(
    kind: str, *, adapter: str = "none", attention: str = "sdpa", **launch: Any
) -> tuple[Any, Setting]:
    """A stage of a 7B as its files have it, under another launch, on a GPU."""
    config = _composed(kind)
    under = decided(replace(config.launch, **launch))
    return config.stage, Setting(under, replace(config.adapter, kind=adapter), gpu=True, attention=attention)


def _roles(shape: Architecture) -> dict[str, Architecture]:
    return dict.fromkeys(("policy", "reference", "reward_model"), shape)


def _peak(kind: str, shape: Architecture, **changes: Any) -> Memory:
    config, setting = _stage(kind, **changes)
    return peak(stage_moments(config, _roles(shape), Work(1024), setting))


def test_weights_gradients_and_moments_are_sixteen_bytes_a_number(shape: Architecture) -> None:
    config, setting = _stage("sft")
    step = stage_moments(config, {"policy": shape}, Work(1024), setting)[3]
    assert step.moment == "step"
    assert step.weights + step.gradients + step.optimizer == 16 * shape.parameters


@pytest.mark.parametrize(("strategy", "parts"), [("ddp", 1), ("zero2", 8), ("zero3", 8), ("fsdp2", 8)])
def test_strategy_cuts_what_its_paper_says(strategy: str, parts: int, shape: Architecture) -> None:
    config, setting = _stage("sft", strategy=strategy, num_processes=8)
    step = stage_moments(config, {"policy": shape}, Work(1024), setting)[3]
    assert step.weights == step.gradients == 4 * shape.parameters / parts
    assert step.optimizer == 8 * shape.parameters / parts


def test_second_stage_of_zero_keeps_16_bit_weights_from_forward_to_backward(shape: Architecture) -> None:
    """arXiv:1910.02054, figure 1: 2 bytes a weight are whole on every process, the rest is cut."""
    copies = {}
    for strategy in ("zero2", "zero3"):
        config, setting = _stage("sft", strategy=strategy, num_processes=64, precision="bf16")
        _, backward = stage_moments(config, {"policy": shape}, Work(1024), setting)[:2]
        copies[strategy] = backward.copies
    gradient = 4 * shape.layer
    assert copies["zero2"] - gradient == 2 * shape.parameters
    assert copies["zero3"] < copies["zero2"]


def test_checkpointing_keeps_a_blocks_input_and_one_block(shape: Architecture) -> None:
    kept = _peak("sft", shape).activations
    checkpointed = _peak("sft", shape, gradient_checkpointing=True).activations
    assert checkpointed < 0.15 * kept


def test_bf16_halves_the_numbers_of_matrix_products_alone(shape: Architecture) -> None:
    wide, narrow = (_peak("sft", shape, precision=precision).activations for precision in ("fp32", "bf16"))
    assert 0.5 < narrow / wide < 0.75


def test_ppo_holds_four_models_and_with_lora_one(shape: Architecture) -> None:
    full, lora = _peak("ppo", shape), _peak("ppo", shape, adapter="lora")
    four = 2 * 4 * (shape.parameters + shape.scalar_parameters)
    assert full.weights + full.frozen == four
    one = 4 * shape.parameters
    assert one < lora.weights + lora.frozen < 1.05 * one
    adapter = shape.adapter_parameters(16, ["all-linear"])
    assert lora.optimizer == 8 * (2 * adapter + shape.hidden_size)


def test_qlora_base_is_half_a_byte_a_weight(shape: Architecture) -> None:
    assert _peak("sft", shape, adapter="qlora").frozen == pytest.approx(0.516 * shape.parameters)


def test_offloaded_moments_are_there_in_the_step_alone(shape: Architecture) -> None:
    config, setting = _stage("sft", optimizer_offload=True)
    moments = {
        memory.moment: memory for memory in stage_moments(config, {"policy": shape}, Work(2048), setting)
    }
    assert moments["loss"].optimizer == 0 and moments["step"].optimizer == 8 * shape.parameters
    here = replace(setting, gpu=False)
    assert peak(stage_moments(config, {"policy": shape}, Work(2048), here)).optimizer > 0


def test_longer_rows_need_more_up_to_the_limit_of_the_stage(shape: Architecture) -> None:
    config, setting = _stage("sft")
    needs = [
        peak(stage_moments(config, {"policy": shape}, Work(length), setting)).total
        for length in (512, 1024, 2048, 9999)
    ]
    assert needs[0] < needs[1] < needs[2] == needs[3]


@pytest.mark.parametrize("kind", ["sft", "rm", "dpo", "rs", "ppo", "collect", "eval"])
def test_no_part_of_any_moment_is_negative(kind: str, shape: Architecture) -> None:
    for strategy in ("single", "ddp", "fsdp2", "zero2", "zero3"):
        for adapter, precision in (("none", "fp32"), ("none", "bf16"), ("lora", "bf16")):
            processes = 1 if strategy == "single" else 4
            launch = {"strategy": strategy, "num_processes": processes, "precision": precision}
            config, setting = _stage(kind, adapter=adapter, **launch)
            for memory in stage_moments(config, _roles(shape), Work(100, 4), setting):
                assert all(getattr(memory, part) >= 0 for part in PARTS), memory


def _kept(model: PreTrainedModel, rows: list[Example], *, bf16: bool, everywhere: bool = False) -> int:
    """Bytes that a forward keeps beside the weights, each storage once; under autocast the 16-bit weights too."""
    batch = collate(rows, 0)
    at = torch.nn.functional.pad(batch.loss_mask[:, 1:], (0, 1)) | everywhere
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = body_states(model, batch, at)
    kept = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    del output
    return kept


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("prompts", [8, 2])
@pytest.mark.parametrize("response", [24, 64])
def test_activations_are_what_a_forward_keeps(
    attention: str, precision: str, prompts: int, response: int, make_llama: Callable[..., PreTrainedModel]
) -> None:
    mask = [False] * 40 + [True] * response
    rows = [Example([row % prompts] * 40 + [9 + row] * response, mask) for row in range(8)]
    _, setting = _stage("sft", precision=precision, attention=attention)
    batch = Batch(8, len(mask), response, (8 - prompts) * setting.shares(40))
    kept, told = [], []
    # The last block keeps less.
    for layers in (2, 3):
        model = make_llama(num_hidden_layers=layers)
        model.set_attn_implementation(attention)
        found = parse_architecture(model.config.to_dict())
        model = keep_gate_and_up(allow_packing(model)).train()
        kept.append(_kept(model, rows, bf16=precision == "bf16"))
        loss = training_moments(Memory(), Role(found), [batch], setting)[0]
        told.append(loss.activations + loss.copies)
    assert told[1] - told[0] == pytest.approx(kept[1] - kept[0], rel=0.01)


@pytest.mark.parametrize(("prompt", "response"), [(40, 24), (40, 64), (80, 40)])
def test_last_block_keeps_what_is_read_alone(
    prompt: int, response: int, make_llama: Callable[..., PreTrainedModel]
) -> None:
    rows = [Example.of([row] * prompt, [9] * response) for row in range(8)]
    model = keep_gate_and_up(allow_packing(make_llama()))
    whole, read = (_kept(model.train(), rows, bf16=False, everywhere=every) for every in (True, False))
    role = Role(parse_architecture(model.config.to_dict()))
    _, setting = _stage("sft")
    told = [
        training_moments(Memory(), role, [Batch(8, prompt + response, learnt)], setting)[1].activations
        for learnt in (prompt + response, response)
    ]
    assert told[0] - told[1] == pytest.approx(whole - read, rel=0.1)


def test_limits_are_those_of_the_code() -> None:
    assert (BLOCK, KEPT_LOGITS, SHORT) == (BLOCK_ELEMENTS * 4, KEPT_ELEMENTS, PADDED)


def _logits(
    shape: Architecture, rows: int = 4, *, scalar: bool = False, entropy: bool = False, **launch: Any
) -> float:
    """Tensors of the size of all logits that 512 learnt tokens a row leave at the loss."""
    _, setting = _stage("sft", precision="bf16", **launch)
    role = Role(shape, num_heads=int(scalar), entropy=entropy)
    loss = training_moments(Memory(), role, [Batch(rows, 1024, 512)], setting)[0]
    return loss.logits / (rows * 512 * shape.vocab_size * 2)


def test_logits_are_held_where_the_whole_model_makes_them_or_where_they_are_few(shape: Architecture) -> None:
    assert _logits(shape) == 0
    assert _logits(replace(shape, vocab_size=8000)) == 1
    assert _logits(shape, scalar=True) == 0
    assert _logits(shape, strategy="fsdp2", num_processes=8) == 2
    assert _logits(shape, entropy=True) == 3
    assert _logits(replace(shape, softcapped=True)) == 3


def test_soft_cap_is_read(shape: Architecture) -> None:
    raw = json.loads((SHAPES / "llama-2-7b" / "config.json").read_text())
    assert not shape.softcapped
    assert parse_architecture({**raw, "model_type": "gemma2", "final_logit_softcapping": 30.0}).softcapped


def test_responses_of_a_ranking_share_their_prompt(shape: Architecture) -> None:
    config, setting = _stage("rm")
    items = (Length(300, 100),) * config.batch_size
    work = Work(300, 4, items)
    batches = training_batches(config, work, setting, 4)
    assert [batch.adds for batch in batches] == [False, True]
    assert {batch.tokens for batch in batches} == {config.micro_batch_size * (200 + 4 * 100)}
    padded = replace(setting, attention="eager")
    assert [batch.tokens for batch in training_batches(config, work, padded, 4)] == [
        config.micro_batch_size * 4 * 300
    ]
    # As data/packing.py lays them.
    rows = [[1] * 200 + [response] * 100 for response in (2, 3, 4, 5)]
    assert lay_out(rows)[-1].end == 200 + 4 * 100


@pytest.mark.parametrize("kind", ["rm", "dpo", "sft"])
def test_shared_prompt_is_read_once_in_the_time_too(kind: str, shape: Architecture) -> None:
    config, setting = _stage(kind)
    rows = Rows(used=600, longest=300, mean=300, mean_prompt=200, responses=4)
    node: Any = SimpleNamespace(config=config, opened={})
    told = []
    for attention in ("sdpa", "eager"):
        found = estimate(node, _roles(shape), rows, 10, replace(setting, attention=attention), TABLE["h100"])
        assert found is not None and found.tokens is not None
        told.append(found.tokens / (10 * config.batch_size))
    assert told == {"rm": [200 + 4 * 100, 4 * 300], "dpo": [200 + 2 * 100, 2 * 300], "sft": [300, 300]}[kind]


def test_every_head_of_a_reward_model_counts(shape: Architecture) -> None:
    config, setting = _stage("rm")
    one, five = (
        stage_moments(replace(config, num_heads=heads), _roles(shape), Work(1024), setting)[0]
        for heads in (1, 5)
    )
    assert five.weights - one.weights == 4 * 4 * shape.hidden_size


def test_table_has_every_accelerator_of_the_configuration() -> None:
    assert set(TABLE) == set(ACCELERATORS)
    launch = compose(["launch.accelerator=h200"]).config.launch
    assert find_machine(launch) == TABLE["h200"]


def test_auto_is_ddp_over_several_processes_and_single_on_one() -> None:
    launch = compose(["launch.num_processes=2"]).config.launch
    assert decided(launch).strategy == "ddp"
    assert decided(replace(launch, num_processes=None)).strategy == "single"
    assert decided(replace(launch, strategy="fsdp2")).strategy == "fsdp2"


def _advice(kind: str, shape: Architecture, available: float, **changes: Any) -> tuple[str, ...] | None:
    config, setting = _stage(kind, **changes)

    def needs(changed: Any, under: Setting) -> Memory:
        return peak(stage_moments(changed, _roles(shape), Work(1024), under))

    found = smallest_change(needs, config, setting, "stage.", available)
    if found is None:
        return None
    assert found.memory.total <= available
    return found.words


def test_smallest_change_is_the_cheapest_that_fits(shape: Architecture) -> None:
    sharded = {"strategy": "fsdp2", "num_processes": 8, "precision": "bf16"}
    assert _advice("sft", shape, 40e9, **sharded) == ("launch.gradient_checkpointing=true",)
    # 108 GB of weights, gradients and moments: no batch is small enough, but there are seven other processes.
    assert _advice("sft", shape, 80e9, **{**sharded, "strategy": "ddp"}) == ("launch.strategy=fsdp2",)
    # Alone, whole weights cannot be trained in 80 GB at all.
    assert _advice("sft", shape, 80e9, precision="bf16") == ("adapter=lora",)
    # Nor with adapters in 20 GB: more processes are the last thing asked for.
    assert _advice("sft", shape, 20e9, precision="bf16") == (
        "launch.gradient_checkpointing=true",
        "launch.strategy=fsdp2 launch.num_processes=8",
    )


def test_advice_names_nothing_that_a_run_refuses(shape: Architecture) -> None:
    for available in (10e9, 20e9, 40e9, 80e9, 160e9):
        found = _advice("sft", shape, available, num_processes=8, strategy="ddp") or ()
        sharded = any("fsdp2" in word for word in found)
        assert not (sharded and {"adapter=lora", "launch.optimizer_offload=true"} & set(found))


def test_smallest_change_of_a_stage_that_only_samples_is_a_smaller_batch(shape: Architecture) -> None:
    assert _advice("collect", shape, 80e9, precision="bf16") == ("stage.generation_batch_size=64",)


def test_nothing_makes_a_model_fit_into_nothing(shape: Architecture) -> None:
    assert _advice("sft", shape, 1e9) is None


def _bare(folder: Path, **changes: Any) -> Path:
    raw = json.loads((SHAPES / "llama-2-70b" / "config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))
    return folder


def _config(project: Project, *words: str) -> Config:
    return project.compose("launch.accelerator=h100", *words).config


def test_folder_with_a_configuration_alone_is_planned(project: Project, tmp_path: Path) -> None:
    folder = _bare(tmp_path / "llama")
    words = [f"model='{folder}'", "launch=fsdp2", "launch.num_processes=64", "launch.precision=bf16"]
    words += [f"model.training.{kind}.batch_size=64" for kind in ("sft", "rm", "rs", "ppo")]
    words += ["model.training.ppo.rollout_size=64"]
    plan = make_plan(_config(project, *words), bare=True)
    for row in plan.rows:
        assert row.estimate is not None and row.estimate.parameters == 68_976_648_192
        assert row.rows is None and row.estimate.tokens is None
    assert any("no tokenizer.json in it, so rows and tokens are unknown" in line for line in plan.warnings)


def test_run_refuses_the_folder_that_can_be_planned(project: Project, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors weights in it") as refused:
        project.run(f"model='{_bare(tmp_path / 'llama')}'")
    assert refused.value.exit_code == 4


def test_plan_with_a_tokenizer_tells_tokens_and_time(
    make_llama: Callable[..., PreTrainedModel], tokenizer: Tokenizer, project: Project, tmp_path: Path
) -> None:
    save_model(make_llama(), tokenizer, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    config = _config(project, f"model='{tmp_path}/model'")
    plan = make_plan(config, bare=True)
    for row in plan.rows:
        assert row.estimate is not None and row.estimate.tokens and row.estimate.seconds
    sft = plan.rows[0]
    assert sft.rows is not None and sft.steps is not None and sft.estimate is not None
    mean = (sft.estimate.tokens or 0) / (sft.steps * 16)
    assert 5 < mean < 60
    prompts, rankings = (
        count_rows(plan.graph.nodes[name], plan.graph, config, plan.chat_template)
        for name in ("collect", "rm")
    )
    response = vars(config.stages["collect"])["max_response_length"]
    # Responses are not there yet, and counted at their longest.
    assert rankings.items == tuple(Length(item.tokens + response, response) for item in prompts.items)
    assert rankings.mean - rankings.mean_prompt == response
    assert max(item.tokens for item in rankings.items) == rankings.longest


def test_folder_of_an_unknown_family_is_planned_without_memory(project: Project, tmp_path: Path) -> None:
    folder = _bare(tmp_path / "odd", model_type="odd", num_local_experts=8)
    plan = make_plan(_config(project, f"model='{folder}'"), bare=True)
    assert all(row.estimate is None for row in plan.rows)
    (line,) = {line for line in plan.warnings if "odd" in line and "model_type" in line}
    assert line == "base: the plan does not know model_type 'odd': parameters and memory are unknown"


def test_stage_that_does_not_fit_is_told_with_a_change_that_works(project: Project, tmp_path: Path) -> None:
    folder = _bare(tmp_path / "llama")
    words = [
        "stage=sft",
        f"model='{folder}'",
        "launch=fsdp2",
        "launch.num_processes=64",
        "launch.precision=bf16",
        "stage.batch_size=64",
    ]
    (line,) = [
        line for line in make_plan(_config(project, *words), bare=True).warnings if "does not fit" in line
    ]
    change = line.split("the smallest change that would: ")[1].split(" (")[0]
    again = make_plan(_config(project, *words, *change.split()), bare=True)
    assert not any("does not fit" in line for line in again.warnings)


def test_every_size_of_the_benchmark_is_used_and_every_case_has_its_own_name() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 12
    assert {case.kind for case in CASES} >= {"sft", "rm", "dpo", "ppo"}


# That of the most models: it samples, scores and trains.
QUICK = (CASES[10],)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_estimate_of_a_small_case_is_within_15_percent_of_its_peak(case: Case, tmp_path: Path) -> None:
    build(case, tmp_path)
    told, _ = estimated(case, tmp_path)
    assert told == pytest.approx(measured(case, tmp_path), rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", [case for case in CASES if case not in QUICK], ids=lambda case: case.name)
def test_estimate_is_within_15_percent_of_the_measured_peak(case: Case, tmp_path: Path) -> None:
    build(case, tmp_path)
    told, _ = estimated(case, tmp_path)
    assert told == pytest.approx(measured(case, tmp_path), rel=TOLERANCE)


def test_ppo_without_a_value_model_plans_none(shape: Architecture) -> None:
    config, setting = _stage("ppo")
    bare = replace(config, advantage="rloo", num_samples=4, rollout_size=config.rollout_size // 4)
    full, found = (peak(stage_moments(c, _roles(shape), Work(1024), setting)) for c in (config, bare))
    assert full.weights - found.weights == 4 * shape.scalar_parameters
    assert full.optimizer - found.optimizer == 8 * shape.scalar_parameters
    assert found.frozen == full.frozen


def test_averaged_policy_is_held_once_more(shape: Architecture) -> None:
    config, setting = _stage("ppo")
    plain, averaged = (
        peak(stage_moments(c, _roles(shape), Work(1024), setting))
        for c in (config, replace(config, ema_decay=0.9))
    )
    assert averaged.weights - plain.weights == 4 * shape.parameters
