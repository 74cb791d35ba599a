"""A saved model opens in plain transformers and gives the same numbers, or the save is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from alignpipe.data.records import Message
from alignpipe.errors import CheckpointError, MachineError
from alignpipe.models.loading import ModelSource, load_policy
from alignpipe.models.saving import save_model, verify_reload
from alignpipe.models.scalar_head import load_scalar_model

IDS = torch.tensor([[5, 17, 300, 4, 9, 88]])


@pytest.fixture
def make_policy(make_llama, make_gpt2, tokenizer, tmp_path):
    def make(name="llama", **fields):
        {"llama": make_llama, "gpt2": make_gpt2}[name](**fields).save_pretrained(tmp_path / "start")
        return load_policy(ModelSource(str(tmp_path / "start")), tokenizer)

    return make


@pytest.mark.parametrize(
    ("name", "fields"), [("llama", {}), ("llama", {"tie_word_embeddings": False}), ("gpt2", {})]
)
def test_a_policy_opens_in_plain_transformers_bit_for_bit(make_policy, tokenizer, tmp_path, name, fields):
    policy = make_policy(name, **fields)
    save_model(policy, tokenizer, tmp_path / "out")
    verify_reload(policy, tmp_path / "out", "policy")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(plain(IDS).logits, policy(IDS).logits)
    assert not list((tmp_path / "out").glob("*.bin"))


def test_a_reward_model_opens_in_plain_transformers_bit_for_bit(make_policy, tokenizer, tmp_path):
    make_policy()
    model = load_scalar_model(ModelSource(str(tmp_path / "start")), tokenizer, seed=0)
    save_model(model, tokenizer, tmp_path / "out")
    verify_reload(model, tmp_path / "out", "reward")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(plain(IDS).logits, model(IDS).logits)
    assert plain.config.num_labels == 1


def test_a_grown_model_keeps_its_new_rows(make_policy, tokenizer, tmp_path):
    policy = make_policy(vocab_size=tokenizer.vocab_size - 2)
    save_model(policy, tokenizer, tmp_path / "out")
    verify_reload(policy, tmp_path / "out", "policy")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == tokenizer.vocab_size


def test_transformers_4_finds_the_names_it_reads(make_policy, tokenizer, tmp_path):
    policy = make_policy(rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0})
    save_model(policy, tokenizer, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 5000.0
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert config["rope_parameters"] == {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}
    assert config["torch_dtype"] == config["dtype"] == "float32"
    verify_reload(policy, tmp_path / "out", "policy")


def test_the_tokenizer_and_generation_settings_go_with_it(make_policy, tokenizer, tmp_path):
    policy = make_policy()
    save_model(policy, tokenizer, tmp_path / "out")
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_id
    assert generation["pad_token_id"] == tokenizer.pad_id
    plain = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = [{"role": "user", "content": "Name three colours."}]
    ids = plain.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert ids["input_ids"] == tokenizer.encode_prompt([Message("user", "Name three colours.")])


def test_a_saved_policy_generates_and_stops_in_plain_transformers(make_policy, tokenizer, tmp_path):
    policy = make_policy(tie_word_embeddings=False)
    with torch.no_grad():
        last = policy.model(IDS).last_hidden_state[0, -1]
        policy.lm_head.weight[tokenizer.eos_id] = 1000 * last
    save_model(policy, tokenizer, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    found = plain.generate(IDS, max_new_tokens=20)
    assert found[0, IDS.shape[1] :].tolist() == [tokenizer.eos_id]


def test_verify_reload_notices_a_changed_weight(make_policy, tokenizer, tmp_path):
    policy = make_policy()
    save_model(policy, tokenizer, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="gives other outputs"):
        verify_reload(policy, tmp_path / "out", "policy")


def test_verify_reload_notices_the_wrong_kind_and_a_cut_file(make_policy, tokenizer, tmp_path):
    policy = make_policy()
    save_model(policy, tokenizer, tmp_path / "out")
    reward = load_scalar_model(ModelSource(str(tmp_path / "out")), tokenizer, seed=0)
    with pytest.raises(CheckpointError, match="gives other outputs"):
        verify_reload(reward, tmp_path / "out", "reward")
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be opened again"):
        verify_reload(policy, tmp_path / "out", "policy")


def test_verify_reload_leaves_the_model_in_the_mode_it_had(make_policy, tokenizer, tmp_path):
    policy = make_policy().train()
    save_model(policy, tokenizer, tmp_path / "out")
    verify_reload(policy, tmp_path / "out", "policy")
    assert policy.training


def test_a_folder_that_cannot_be_written_is_a_machine_error(make_policy, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot be written"):
        save_model(make_policy(), tokenizer, tmp_path / "file" / "out")


def test_saving_prints_nothing(make_policy, tokenizer, tmp_path, capfd):
    policy = make_policy()
    capfd.readouterr()
    save_model(policy, tokenizer, tmp_path / "out")
    verify_reload(policy, tmp_path / "out", "policy")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
