"""Models open whole or not at all: what is refused, what is set, what grows."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import CheckpointError, ConfigError, MachineError
from alignpipe.models.loading import ModelSource, freeze, load_policy, max_positions, num_rows, quiet
from alignpipe.models.scalar_head import load_scalar_model

IDS = torch.tensor([[5, 17, 300, 4, 9, 88]])


def source(path):
    return ModelSource(str(path))


def edit_json(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture
def folder(make_llama, tmp_path):
    make_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_tiny_is_built_from_its_seed_alone(tokenizer, architecture):
    tiny = ModelSource("tiny", architecture=architecture)
    torch.manual_seed(1)
    first = load_policy(tiny, tokenizer)
    state = torch.get_rng_state()
    second = load_policy(tiny, tokenizer)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first(IDS).logits, second(IDS).logits)
    architecture.seed = 1
    assert not torch.equal(load_policy(tiny, tokenizer)(IDS).logits, first(IDS).logits)
    assert num_rows(first) == tokenizer.vocab_size
    assert max_positions(first) == 512


def test_tiny_with_an_impossible_shape_is_a_config_error(tokenizer, architecture):
    architecture.hidden_size = 36
    with pytest.raises(ConfigError, match=r"model\.architecture\.hidden_size: 36 .* num_heads \(4\)"):
        load_policy(ModelSource("tiny", architecture=architecture), tokenizer)


@pytest.mark.parametrize("tied", [True, False])
def test_load_policy_gives_back_the_saved_weights(make_llama, tokenizer, tmp_path, tied):
    model = make_llama(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_policy(source(tmp_path), tokenizer)(IDS).logits, model(IDS).logits)


def test_load_policy_sets_ids_and_forgets_the_bases_sampling_defaults(folder, tokenizer):
    (folder / "generation_config.json").write_text(json.dumps({"top_p": 0.8, "temperature": 0.6}))
    policy = load_policy(source(folder), tokenizer)
    assert policy.config.pad_token_id == policy.generation_config.pad_token_id == tokenizer.pad_id
    assert policy.config.eos_token_id == policy.generation_config.eos_token_id == tokenizer.eos_id
    assert policy.generation_config.top_p in (None, 1.0)
    assert policy.dtype == torch.float32
    assert not policy.training


def test_load_policy_turns_dropout_off_even_in_training_mode(make_gpt2, tokenizer, tmp_path):
    model = make_gpt2(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model.save_pretrained(tmp_path)
    policy = load_policy(source(tmp_path), tokenizer).train()
    assert not torch.equal(model.train()(IDS).logits, model(IDS).logits)
    assert torch.equal(policy(IDS).logits, policy(IDS).logits)
    assert policy.config.attn_pdrop == 0.0


def test_load_policy_turns_attention_dropout_off(make_llama, tokenizer, tmp_path):
    make_llama(attention_dropout=0.5).save_pretrained(tmp_path)
    policy = load_policy(source(tmp_path), tokenizer).train()
    assert torch.equal(policy(IDS).logits, policy(IDS).logits)


def test_embeddings_grow_only_when_the_tokenizer_has_more_ids(make_llama, tokenizer, tmp_path):
    small = make_llama(vocab_size=tokenizer.vocab_size - 3, tie_word_embeddings=False)
    small.save_pretrained(tmp_path / "small")
    grown = load_policy(source(tmp_path / "small"), tokenizer)
    assert num_rows(grown) == grown.config.vocab_size == tokenizer.vocab_size
    old = small.get_input_embeddings().weight
    torch.testing.assert_close(grown.get_input_embeddings().weight[-3:], old.mean(0).expand(3, -1))
    torch.testing.assert_close(grown(IDS).logits[..., :-3], small(IDS).logits)
    make_llama(vocab_size=tokenizer.vocab_size + 5).save_pretrained(tmp_path / "large")
    assert num_rows(load_policy(source(tmp_path / "large"), tokenizer)) == tokenizer.vocab_size + 5


def test_missing_folder_names_the_nearest_one(folder, tokenizer):
    with pytest.raises(CheckpointError, match=r"no such folder\. Did you mean model"):
        load_policy(source(folder.parent / "modle"), tokenizer)


def test_unreachable_hub_id_is_a_machine_error(tokenizer, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MachineError, match="nobody/nothing: no such folder"):
        load_policy(ModelSource("nobody/nothing"), tokenizer)


def test_a_relative_folder_with_one_slash_is_a_folder(make_llama, tokenizer, monkeypatch, tmp_path):
    make_llama().save_pretrained(tmp_path / "outputs" / "model")
    monkeypatch.chdir(tmp_path)
    assert ModelSource("outputs/model").folder() == Path("outputs/model")


def break_config(folder):
    (folder / "config.json").write_text("{")


def drop_config(folder):
    (folder / "config.json").unlink()


def adapter_only(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def own_code(folder):
    edit_json(folder / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})


def own_kernel(folder):
    edit_json(folder / "config.json", _attn_implementation_internal="somebody/kernel")


def no_model_type(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))


def unknown_model_type(folder):
    edit_json(folder / "config.json", model_type="lllama")


def drop_weights(folder):
    (folder / "model.safetensors").unlink()


def pickled_weights(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def half_written(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")


def other_shape(folder):
    edit_json(folder / "config.json", intermediate_size=48)


def more_layers(folder):
    edit_json(folder / "config.json", num_hidden_layers=3)


def fewer_layers(folder):
    edit_json(folder / "config.json", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_config, "config.json: not JSON"),
        (drop_config, "no config.json in it"),
        (adapter_only, "an adapter without its model"),
        (own_code, "auto_map"),
        (own_kernel, "_attn_implementation_internal"),
        (no_model_type, "no model_type"),
        (unknown_model_type, "cannot open it"),
        (drop_weights, "no weights"),
        (pickled_weights, "only pickled weights"),
        (half_written, "model.safetensors: cut short or damaged"),
        (empty_weights, "model.safetensors: cut short or damaged"),
        (other_shape, r"wrongly shaped weights: .*, \.\.\. 6 in all"),
        (more_layers, r"missing weights: .*, \.\.\. 9 in all"),
        (fewer_layers, r"unknown weights: .*, \.\.\. 9 in all"),
    ],
)
def test_a_bad_folder_is_refused_in_one_line(folder, tokenizer, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_policy(source(folder), tokenizer)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_shards_missing_or_outside_of_the_folder_are_refused(make_llama, tokenizer, tmp_path):
    make_llama().save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_policy(source(tmp_path), tokenizer)
    shards[1].rename(tmp_path / "away")
    with pytest.raises(
        CheckpointError, match=f"1 of {len(shards)} weight files missing, first {shards[1].name}"
    ):
        load_policy(source(tmp_path), tokenizer)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace(shards[1].name, "../" + shards[1].name))
    with pytest.raises(CheckpointError, match="lies outside of the folder"):
        load_policy(source(tmp_path), tokenizer)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(make_llama, tokenizer, tmp_path, value):
    model = make_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        load_policy(source(tmp_path), tokenizer)


@pytest.mark.parametrize("tied", [True, False])
def test_a_reward_model_is_no_policy(make_llama, tokenizer, tmp_path, tied):
    make_llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "lm")
    load_scalar_model(source(tmp_path / "lm"), tokenizer, seed=0).save_pretrained(tmp_path / "rm")
    with pytest.raises(CheckpointError, match="a reward model, where a language model is needed"):
        load_policy(source(tmp_path / "rm"), tokenizer)


def test_missing_attention_implementation_is_a_machine_error(folder, tokenizer):
    with pytest.raises(MachineError, match="use sdpa"):
        load_policy(source(folder), tokenizer, attn_implementation="flash_attention_2")


def test_loading_prints_nothing(folder, tokenizer, capfd):
    load_policy(source(folder), tokenizer)
    load_scalar_model(source(folder), tokenizer, seed=0)
    with quiet():
        AutoConfig.from_pretrained(folder)
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_freeze_takes_gradients_off(folder, tokenizer):
    model = freeze(load_policy(source(folder), tokenizer).train())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_real_pretrained_model_opens(shared_data):
    path = shared_data / "models" / "stories260K"
    real = Tokenizer.load(path, "{{ messages[0].content }}")
    policy = load_policy(source(path), real)
    ids = torch.tensor([[real.bos_id, *real.encode_text("Once upon a time, there was a little")[1:]]])
    nll = policy(ids, labels=ids).loss.item()
    # A model that was not read right would be near ln 512 = 6.2.
    assert nll < 3
