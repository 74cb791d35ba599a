"""Parameter counts and kept activations are those of transformers' own models, without opening a weight."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from alignpipe.errors import CheckpointError
from alignpipe.pipeline.architecture import Architecture, read_architecture

SMALL = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2_SMALL = {
    "vocab_size": 96,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
LLAMA_70B = {
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", SMALL),
    ("llama", {**SMALL, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    ("llama", LLAMA_70B),
    ("mistral", SMALL),
    ("qwen2", SMALL),
    ("qwen2", {**SMALL, "tie_word_embeddings": True}),
    ("qwen3", SMALL),
    ("qwen3", {**SMALL, "attention_bias": True}),
    ("gemma", SMALL),
    ("gemma2", SMALL),
    ("gemma3_text", SMALL),
    ("gpt2", GPT2_SMALL),
    ("gpt2", {**GPT2_SMALL, "n_inner": 100, "tie_word_embeddings": False}),
]


def _ids(case: tuple[str, dict[str, Any]]) -> str:
    return f"{case[0]}-{'-'.join(sorted(set(case[1]) - set(SMALL) - set(GPT2_SMALL))) or 'plain'}"


def _config(model_type: str, fields: dict[str, Any]) -> PreTrainedConfig:
    return AutoConfig.for_model(model_type, **fields)


def _read(config: PreTrainedConfig, folder: Path) -> Architecture:
    config.save_pretrained(folder)
    found, note = read_architecture(folder)
    assert found is not None and found.exact and note == ""
    return found


def _size(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("model_type", "fields"), CASES, ids=map(_ids, CASES))
def test_parameters_are_those_of_transformers(
    model_type: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    config = _config(model_type, fields)
    found = _read(config, tmp_path)
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(config)
        config.num_labels = 1
        reward = AutoModelForSequenceClassification.from_config(config)
    assert found.parameters == _size(policy)
    assert found.scalar_parameters == _size(reward)


def _kept(model: PreTrainedModel, rows: int, length: int) -> int:
    """Bytes that a forward keeps for the backward pass beside the weights, each storage once."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = tensor
        return tensor

    ids = torch.zeros(rows, length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=ids, use_cache=False, logits_to_keep=torch.arange(1))
    kept = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    del output
    return kept


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt2"])
def test_kept_activations_are_those_of_a_forward_pass(model_type: str, tmp_path: Path) -> None:
    name = "n_layer" if model_type == "gpt2" else "num_hidden_layers"
    fields = GPT2_SMALL if model_type == "gpt2" else SMALL
    sizes = []
    for layers in (1, 2):
        config = _config(model_type, {**fields, name: layers})
        found = _read(config, tmp_path)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
        sizes.append(_kept(model, 2, 32))
    per_token = (sizes[1] - sizes[0]) / 4 / 64
    # Gemma keeps one vector a norm beside.
    assert per_token == pytest.approx(found.kept + found.kept_wide, abs=2)


def test_adapter_has_the_parameters_of_peft(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    config = _config("llama", SMALL)
    found = _read(config, tmp_path)
    for targets in (["all-linear"], ["q_proj", "v_proj"]):
        model = AutoModelForCausalLM.from_config(config)
        given: Any = "all-linear" if targets == ["all-linear"] else targets
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=given, task_type="CAUSAL_LM")
        )
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert found.adapter_parameters(4, targets) == trained


def test_unknown_family_is_estimated_and_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "model_type": "brandnew"}))
    found, note = read_architecture(tmp_path)
    assert found is not None and not found.exact
    assert (
        note == "the plan does not know model_type 'brandnew': parameters and memory are estimated as Llama's"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "mamba", "vocab_size": 96, "hidden_size": 48},
        {**SMALL, "model_type": "mixtral", "num_local_experts": 8},
        {"model_type": "llama", "vocab_size": 96},
        {**SMALL, "model_type": "llama", "hidden_size": "wide"},
    ],
    ids=["no decoder", "experts", "half a shape", "no number"],
)
def test_shape_that_means_nothing_is_unknown_in_one_line(fields: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found, note = read_architecture(tmp_path)
    assert found is None
    assert note.endswith("parameters and memory are unknown") and "\n" not in note


def test_configuration_that_is_no_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(CheckpointError, match="cannot be read as a model configuration"):
        read_architecture(tmp_path)
