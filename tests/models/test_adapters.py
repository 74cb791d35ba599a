"""Roles are adapters on one base: new ones change nothing, each learns alone, folders open in plain transformers."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.optim import AdamW
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from alignpipe.config import AdapterConfig
from alignpipe.data.collate import collate
from alignpipe.data.examples import Example
from alignpipe.errors import CheckpointError, MachineError
from alignpipe.losses.logprobs import token_logprobs
from alignpipe.models.adapters import Adapters
from alignpipe.models.forward import batch_logprobs
from alignpipe.models.loading import ModelSource, freeze, load_policy
from alignpipe.models.saving import save_model, verify_reload
from alignpipe.models.scalar_head import load_scalar_model, score_head, sequence_scores
from alignpipe.training.optim import make_optimizer
from tests.project import Project

IDS = torch.tensor([[5, 17, 300, 4, 9, 88]])
LORA = AdapterConfig("lora", 4, 8.0, 10.0, ["all-linear"], "keep")


every_architecture = pytest.mark.parametrize("llama", ["tied", "untied", "gpt2"], indirect=True)


@pytest.fixture
def llama(request, make_llama, make_gpt2, tmp_path):
    """A folder of whole weights: a Llama's unless the test asks for every architecture."""
    name = getattr(request, "param", "tied")
    model = make_gpt2() if name == "gpt2" else make_llama(tie_word_embeddings=name == "tied")
    model.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def adapters():
    return Adapters(LORA, seed=0)


def open_with(adapters):
    def source(folder):
        return ModelSource(str(folder), adapters=adapters)

    return source


def learnt(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def shake(model, seed=0):
    """As training leaves it: every trained weight moved."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in learnt(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def stored(llama, adapters, tokenizer, tmp_path):
    """Checkpoints of a trained policy and a trained reward model, with what they give."""
    source = open_with(adapters)
    policy = shake(load_policy(source(llama), tokenizer))
    save_model(policy, tokenizer, tmp_path / "sft", adapters)
    reward = shake(load_scalar_model(source(tmp_path / "sft"), tokenizer, seed=0), seed=1)
    save_model(reward, tokenizer, tmp_path / "rm", adapters)
    return {"sft": (tmp_path / "sft", logits(policy)), "rm": (tmp_path / "rm", logits(reward))}


def test_several_heads_beside_an_adapter_are_kept_or_made_one(llama, adapters, tokenizer, tmp_path):
    source = open_with(adapters)
    reward = shake(load_scalar_model(source(llama), tokenizer, seed=0, num_heads=3))
    save_model(reward, tokenizer, tmp_path / "rm", adapters)
    kept = load_scalar_model(source(tmp_path / "rm"), tokenizer, all_heads=True)
    assert torch.equal(logits(kept), logits(reward))
    mean = load_scalar_model(source(tmp_path / "rm"), tokenizer)
    torch.testing.assert_close(logits(mean)[:, 0], logits(reward).mean(1), atol=1e-6, rtol=1e-6)
    assert {n for n in learnt(mean) if "score" in n} == {n for n in learnt(reward) if "score" in n}


@every_architecture
def test_new_adapter_changes_nothing(llama, adapters, tokenizer):
    source = open_with(adapters)
    plain = load_policy(ModelSource(str(llama)), tokenizer)
    assert torch.equal(logits(load_policy(source(llama), tokenizer)), logits(plain))
    with_head = load_scalar_model(source(llama), tokenizer, seed=3)
    assert torch.equal(
        logits(with_head), logits(load_scalar_model(ModelSource(str(llama)), tokenizer, seed=3))
    )


def test_roles_share_every_base_tensor_and_no_trained_one(stored, adapters, tokenizer):
    source = open_with(Adapters(LORA, seed=0))
    sft, rm = stored["sft"][0], stored["rm"][0]
    roles = [load_policy(source(sft), tokenizer) for _ in range(2)]
    roles += [load_scalar_model(source(rm), tokenizer) for _ in range(2)]
    frozen = [
        {id(p) for name, p in role.base_model.named_parameters() if "lora" not in name} for role in roles
    ]
    assert frozen[0] and all(ids == frozen[0] for ids in frozen)
    trained = [id(p) for role in roles for p in learnt(role).values()]
    assert len(trained) == len(set(trained)) == sum(len(learnt(role)) for role in roles)
    assert all("lora_" in name or "score.modules_to_save" in name for role in roles for name in learnt(role))


def test_one_role_learns_and_the_others_and_the_base_stay(llama, adapters, tokenizer):
    source = open_with(adapters)
    policy, reference = load_policy(source(llama), tokenizer), freeze(load_policy(source(llama), tokenizer))
    value = load_scalar_model(source(llama), tokenizer, seed=0)
    assert learnt(policy) and learnt(value) and not learnt(reference)
    base = {name: p.detach().clone() for name, p in policy.named_parameters() if not p.requires_grad}
    before = [logits(role) for role in (policy, reference, value)]
    optimizer = AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        # Two roles in one graph: nothing is switched between them.
        loss = (policy(input_ids=IDS).logits - reference(input_ids=IDS).logits - 1).pow(2).mean()
        loss.backward()
        optimizer.step()
    after = [logits(role) for role in (policy, reference, value)]
    assert not torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1]) and torch.equal(after[2], before[2])
    for name, parameter in policy.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]) and parameter.grad is None, name
    assert all(p.grad is None for role in (reference, value) for p in role.parameters())


def test_only_adapter_and_head_are_in_the_optimizer(llama, adapters, tokenizer, project: Project):
    value = load_scalar_model(open_with(adapters)(llama), tokenizer, seed=0)
    config = project.compose("stage=rm", "stage.data=toy").config.stage
    held = {id(p) for group in make_optimizer(value, config).param_groups for p in group["params"]}
    assert held == {id(p) for p in learnt(value).values()}
    assert id(score_head(value).weight) in held


@every_architecture
@pytest.mark.parametrize(
    ("name", "auto_class"),
    [("sft", AutoModelForCausalLM), ("rm", AutoModelForSequenceClassification)],
)
def test_folder_opens_in_plain_transformers_wherever_it_goes(stored, llama, name, auto_class, tmp_path):
    folder, expected = stored[name]
    moved = shutil.copytree(folder, tmp_path / "elsewhere" / "model")
    shutil.rmtree(folder)
    shutil.rmtree(llama)
    plain = auto_class.from_pretrained(moved)
    assert torch.equal(logits(plain), expected)
    # With the adapter, not the base alone.
    plain.disable_adapters()
    assert not torch.equal(logits(plain), expected)


def test_raw_scores_are_those_of_plain_transformers(stored, adapters, tokenizer):
    folder = stored["rm"][0]
    batch = collate([Example([5, 9, 70, 8], [False] * 4), Example([6, 300], [False] * 2)], tokenizer.pad_id)
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    mask = torch.arange(4) < batch.lengths[:, None]
    expected = plain(input_ids=batch.input_ids, attention_mask=mask.long()).logits.squeeze(-1)
    found = sequence_scores(load_scalar_model(open_with(adapters)(folder), tokenizer), batch)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    head = load_file(folder / "adapter_model.safetensors")["base_model.model.score.weight"]
    assert torch.equal(head, plain.score.modules_to_save.default.weight)


def test_child_begins_as_its_parent_opened_by_anybody(stored, tokenizer):
    folder = stored["sft"][0]
    reference = freeze(load_policy(open_with(Adapters(LORA, seed=7))(folder), tokenizer))
    batch = collate([Example([5, 9, 70, 8], [False, True, True, True])], tokenizer.pad_id)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    expected = token_logprobs(plain(input_ids=batch.input_ids).logits, batch.input_ids)
    torch.testing.assert_close(batch_logprobs(reference, batch), expected, atol=1e-6, rtol=1e-6)


def test_grandchild_finds_the_same_base_in_a_copied_folder(stored, tokenizer, tmp_path):
    again = Adapters(LORA, seed=0)
    source = open_with(again)
    shutil.copytree(stored["rm"][0], tmp_path / "copy")
    load_policy(source(stored["sft"][0]), tokenizer)
    load_scalar_model(source(tmp_path / "copy"), tokenizer)
    assert len(again.bases) == 1


def test_files_of_the_store_are_linked_and_those_of_a_user_copied(llama, adapters, tokenizer, tmp_path):
    source = open_with(adapters)
    save_model(load_policy(source(llama), tokenizer), tokenizer, tmp_path / "sft", adapters)
    assert (tmp_path / "sft" / "model.safetensors").stat().st_nlink == 1
    manifest = {"kind": "sft", "key": "0", "format": 1, "files": {}, "parents": {}}
    (tmp_path / "sft" / "alignpipe.json").write_text(json.dumps(manifest))
    later = Adapters(LORA, seed=0)
    save_model(load_policy(open_with(later)(tmp_path / "sft"), tokenizer), tokenizer, tmp_path / "rs", later)
    assert (tmp_path / "rs" / "model.safetensors").samefile(tmp_path / "sft" / "model.safetensors")


def test_configuration_names_the_base_a_user_knows(llama, adapters, tokenizer, tmp_path):
    save_model(load_policy(open_with(adapters)(llama), tokenizer), tokenizer, tmp_path / "sft", adapters)
    later = Adapters(LORA, seed=0)
    save_model(load_policy(open_with(later)(tmp_path / "sft"), tokenizer), tokenizer, tmp_path / "rs", later)
    for name in ("sft", "rs"):
        written = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert written["base_model_name_or_path"] == str(llama)
        assert written["target_modules"] == sorted(written["target_modules"])


def test_grown_embeddings_are_written_with_the_base(make_llama, adapters, tokenizer, tmp_path):
    make_llama(vocab_size=tokenizer.vocab_size - 2).save_pretrained(tmp_path / "whole")
    policy = shake(load_policy(open_with(adapters)(tmp_path / "whole"), tokenizer))
    save_model(policy, tokenizer, tmp_path / "sft", adapters)
    verify_reload(policy, tmp_path / "sft", "policy")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert plain.get_input_embeddings().weight.shape[0] == tokenizer.vocab_size
    assert torch.equal(logits(plain), logits(policy))
    assert (
        json.loads((tmp_path / "sft" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    )


def test_built_model_is_written_with_its_first_adapter(adapters, architecture, tokenizer, tmp_path):
    source = ModelSource("tiny", architecture=architecture, adapters=adapters)
    policy = shake(load_policy(source, tokenizer))
    save_model(policy, tokenizer, tmp_path / "sft", adapters)
    verify_reload(policy, tmp_path / "sft", "policy")
    again = load_policy(ModelSource("tiny", architecture=architecture), tokenizer)
    written = load_file(tmp_path / "sft" / "model.safetensors")
    assert torch.equal(written["model.embed_tokens.weight"], again.get_input_embeddings().weight)


@every_architecture
@pytest.mark.parametrize("name", ["sft", "rm"])
def test_adapter_is_merged_where_whole_weights_are_trained(stored, tokenizer, name, tmp_path):
    folder, expected = stored[name]
    load = load_policy if name == "sft" else load_scalar_model
    model = load(ModelSource(str(folder)), tokenizer)
    torch.testing.assert_close(logits(model), expected, atol=2e-4, rtol=2e-4)
    assert not any("lora" in key or "base_layer" in key for key in model.state_dict())
    assert all(p.requires_grad for p in model.parameters())
    save_model(model, tokenizer, tmp_path / "merged")
    verify_reload(model, tmp_path / "merged", "policy" if name == "sft" else "reward")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_new_head_goes_on_a_merged_policy(stored, tokenizer):
    model = load_scalar_model(ModelSource(str(stored["sft"][0])), tokenizer, seed=0)
    merged = load_policy(ModelSource(str(stored["sft"][0])), tokenizer)
    for name, parameter in merged.base_model.named_parameters():
        assert torch.equal(parameter, model.base_model.get_parameter(name)), name


def test_whole_reward_model_is_the_base_of_its_own_roles(llama, tokenizer, tmp_path, adapters):
    scalar = load_scalar_model(ModelSource(str(llama)), tokenizer, seed=5)
    save_model(scalar, tokenizer, tmp_path / "rm")
    source = open_with(adapters)(tmp_path / "rm")
    value, reward = load_scalar_model(source, tokenizer), freeze(load_scalar_model(source, tokenizer))
    assert torch.equal(logits(value), logits(scalar)) and torch.equal(logits(reward), logits(scalar))
    shake(value)
    assert not torch.equal(logits(value), logits(scalar)) and torch.equal(logits(reward), logits(scalar))
    assert len(adapters.bases) == 1


def test_seed_draws_new_adapters_and_leaves_the_global_one_alone(llama, tokenizer):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    drawn = [
        next(iter(learnt(load_policy(open_with(Adapters(LORA, seed))(llama), tokenizer)).values()))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (AdapterConfig("lora", 8, 8.0, 10.0, ["all-linear"], "keep"), "its adapter has r 4, not 8"),
        (AdapterConfig("lora", 4, 16.0, 10.0, ["all-linear"], "keep"), "lora_alpha 8.0, not 16.0"),
        (AdapterConfig("lora", 4, 8.0, 10.0, ["q_proj"], "keep"), "other layers, such as "),
    ],
)
def test_parent_with_another_adapter_is_refused(llama, adapters, tokenizer, tmp_path, config, told):
    save_model(load_policy(open_with(adapters)(llama), tokenizer), tokenizer, tmp_path / "sft", adapters)
    with pytest.raises(CheckpointError, match=told):
        load_policy(open_with(Adapters(config, 0))(tmp_path / "sft"), tokenizer)


def test_layers_that_are_not_there_are_refused_in_one_line(llama, tokenizer):
    config = AdapterConfig("lora", 4, 8.0, 10.0, ["no_such_proj"], "keep")
    with pytest.raises(CheckpointError, match=r"^adapter\.target_modules: .*no_such_proj") as caught:
        load_policy(open_with(Adapters(config, 0))(llama), tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("adapted", [True, False])
def test_roles_of_the_wrong_kind_are_refused(stored, tokenizer, adapted):
    source = open_with(Adapters(LORA, 0) if adapted else None)
    with pytest.raises(CheckpointError, match="a reward model, where a language model is needed"):
        load_policy(source(stored["rm"][0]), tokenizer)
    with pytest.raises(CheckpointError, match="already a reward model"):
        load_scalar_model(source(stored["rm"][0]), tokenizer, seed=0)
    with pytest.raises(CheckpointError, match="a language model, where a reward model is needed"):
        load_scalar_model(source(stored["sft"][0]), tokenizer)


def test_adapter_without_peft_is_never_the_base_in_silence(stored, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MachineError, match=r"pip install 'alignpipe\[lora\]'"):
        load_policy(ModelSource(str(stored["sft"][0])), tokenizer)


def test_adapter_that_is_cut_short_is_refused(llama, adapters, tokenizer, tmp_path):
    save_model(load_policy(open_with(adapters)(llama), tokenizer), tokenizer, tmp_path / "sft", adapters)
    path = tmp_path / "sft" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        load_policy(open_with(Adapters(LORA, 0))(tmp_path / "sft"), tokenizer)


def test_four_bits_without_cuda_are_refused(llama, tokenizer):
    config = AdapterConfig("qlora", 4, 8.0, 10.0, ["all-linear"], "keep")
    with pytest.raises(MachineError, match="needs a CUDA device"):
        load_policy(open_with(Adapters(config, 0))(llama), tokenizer)
