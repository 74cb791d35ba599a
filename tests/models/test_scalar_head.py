"""Scores are those of plain transformers, at the last real token, whatever the padding."""

from math import sqrt

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
)

from alignpipe.data.collate import collate
from alignpipe.data.examples import Example
from alignpipe.errors import CheckpointError
from alignpipe.models.loading import ModelSource, load_policy
from alignpipe.models.saving import save_model
from alignpipe.models.scalar_head import (
    load_scalar_model,
    score_head,
    sequence_head_scores,
    sequence_scores,
    token_scores,
)


@pytest.fixture(params=["llama", "gpt2"])
def saved(request, make_llama, make_gpt2, tokenizer, tmp_path):
    """A saved reward model of two architectures."""
    {"llama": make_llama, "gpt2": make_gpt2}[request.param]().save_pretrained(tmp_path / "lm")
    model = load_scalar_model(ModelSource(str(tmp_path / "lm")), tokenizer, seed=3)
    save_model(model, tokenizer, tmp_path / "rm")
    return tmp_path / "rm"


@pytest.fixture
def reward_model(saved, tokenizer):
    return load_scalar_model(ModelSource(str(saved)), tokenizer)


@pytest.fixture
def examples():
    torch.manual_seed(0)
    return [Example(torch.randint(4, 600, (n,)).tolist(), [False] * n) for n in (7, 3, 12, 1, 9, 9, 2, 5)]


def plain_scores(model, examples, pad_id, side):
    width = max(len(example.ids) for example in examples)
    ids, mask = [], []
    for example in examples:
        pads = width - len(example.ids)
        row, real = example.ids, [1] * len(example.ids)
        ids.append(row + [pad_id] * pads if side == "right" else [pad_id] * pads + row)
        mask.append(real + [0] * pads if side == "right" else [0] * pads + real)
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.squeeze(-1)


@pytest.mark.parametrize("side", ["right", "left"])
def test_sequence_scores_equal_plain_transformers(saved, reward_model, examples, tokenizer, side):
    plain = AutoModelForSequenceClassification.from_pretrained(saved)
    found = sequence_scores(reward_model, collate(examples, tokenizer.pad_id))
    expected = plain_scores(plain, examples, tokenizer.pad_id, side)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert found.std() > 0.1


def token_scores_of(model, examples):
    """At every token of every row."""
    batch = collate(examples, 0)
    real = torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]
    return token_scores(model, batch, real)


def test_sequence_scores_do_not_depend_on_batch_padding_or_order(reward_model, examples, tokenizer):
    together = sequence_scores(reward_model, collate(examples, tokenizer.pad_id))
    alone = torch.cat([sequence_scores(reward_model, collate([e], tokenizer.pad_id)) for e in examples])
    turned = sequence_scores(reward_model, collate(examples[::-1], tokenizer.pad_id)).flip(0)
    other_pad = sequence_scores(reward_model, collate(examples, 42))
    for scores in (alone, turned, other_pad):
        torch.testing.assert_close(scores, together, atol=1e-5, rtol=1e-5)


def test_a_pad_id_inside_of_a_text_is_a_token_like_any_other(reward_model, tokenizer):
    text = Example([5, tokenizer.pad_id, 9, tokenizer.pad_id], [False] * 4)
    found = sequence_scores(reward_model, collate([text, Example([5] * 8, [False] * 8)], tokenizer.pad_id))
    torch.testing.assert_close(found[0], token_scores_of(reward_model, [text])[0, -1])


def test_token_scores_at_each_length_are_the_scores_of_the_prefixes(reward_model, examples, tokenizer):
    ids = examples[2].ids
    found = token_scores_of(reward_model, [examples[2]])[0]
    prefixes = [Example(ids[:n], [False] * n) for n in range(1, len(ids) + 1)]
    expected = sequence_scores(reward_model, collate(prefixes, tokenizer.pad_id))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_scores_stay_float32_under_autocast(reward_model, examples, tokenizer):
    batch = collate(examples, tokenizer.pad_id)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sequence_scores(reward_model, batch)
    assert found.dtype == torch.float32
    # Rounded to bfloat16 they would be their own images.
    assert (found.bfloat16().float() != found).any()


def test_new_head_has_the_deviation_of_the_paper_and_its_own_seed(make_llama, tokenizer, tmp_path):
    make_llama(hidden_size=512, num_hidden_layers=1).save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path))
    heads = [score_head(load_scalar_model(source, tokenizer, seed=seed)).weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert heads[0].std().item() == pytest.approx(1 / sqrt(513), rel=0.1)


def test_configuration_is_what_serving_tools_expect(reward_model, tokenizer):
    config = reward_model.config
    assert (config.num_labels, config.problem_type) == (1, "regression")
    assert config.pad_token_id == tokenizer.pad_id


def test_scalar_model_has_the_body_of_the_language_model(make_llama, tokenizer, tmp_path, architecture):
    make_llama().save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    for source in (ModelSource(str(tmp_path)), ModelSource("tiny", architecture=architecture)):
        policy = load_policy(source, tokenizer)
        scalar = load_scalar_model(source, tokenizer, seed=0)
        bodies = [model.base_model(ids).last_hidden_state for model in (policy, scalar)]
        assert torch.equal(*bodies)


def test_a_head_where_none_is_wanted_and_none_where_one_is(
    saved, make_llama, tokenizer, tmp_path, architecture
):
    with pytest.raises(CheckpointError, match="already a reward model, where a language model is needed"):
        load_scalar_model(ModelSource(str(saved)), tokenizer, seed=0)
    make_llama().save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="a language model, where a reward model is needed"):
        load_scalar_model(ModelSource(str(tmp_path / "other")), tokenizer)
    with pytest.raises(CheckpointError, match="untrained language model"):
        load_scalar_model(ModelSource("tiny", architecture=architecture), tokenizer)


def test_more_than_the_head_missing_is_refused(make_llama, tokenizer, tmp_path):
    make_llama().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(CheckpointError, match=r"missing weights: .* 9 in all"):
        load_scalar_model(ModelSource(str(tmp_path)), tokenizer, seed=0)


def test_an_architecture_without_a_score_head_is_named(tokenizer, tmp_path):
    config = BertConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="BertForSequenceClassification: has no `score` head"):
        load_scalar_model(ModelSource(str(tmp_path)), tokenizer, seed=0)


@pytest.fixture
def two_heads(make_llama, tokenizer, tmp_path):
    """A saved reward model with as many heads as transformers takes for granted, and writes no labels of."""
    make_llama().save_pretrained(tmp_path / "lm")
    model = load_scalar_model(ModelSource(str(tmp_path / "lm")), tokenizer, seed=3, num_heads=2)
    save_model(model, tokenizer, tmp_path / "rm")
    return tmp_path / "rm", model


def test_heads_differ_and_their_mean_is_the_score(two_heads, examples, tokenizer):
    _, model = two_heads
    batch = collate(examples, tokenizer.pad_id)
    heads = sequence_head_scores(model, batch)
    assert heads.shape == (len(examples), 2)
    assert (heads[:, 0] - heads[:, 1]).abs().min() > 1e-3
    torch.testing.assert_close(sequence_scores(model, batch), heads.mean(1))


def test_several_heads_open_in_plain_transformers_as_labels_of_a_regression(two_heads, examples, tokenizer):
    folder, model = two_heads
    plain = AutoModelForSequenceClassification.from_pretrained(folder)
    assert (plain.config.num_labels, plain.config.problem_type) == (2, "regression")
    ids = torch.tensor([examples[2].ids])
    expected = sequence_head_scores(model, collate([examples[2]], tokenizer.pad_id))
    torch.testing.assert_close(plain(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
    again = load_scalar_model(ModelSource(str(folder)), tokenizer, all_heads=True)
    assert torch.equal(score_head(again).weight, score_head(model).weight)


def test_a_value_model_starts_from_the_mean_of_the_heads(two_heads, examples, tokenizer):
    folder, model = two_heads
    value = load_scalar_model(ModelSource(str(folder)), tokenizer)
    head = score_head(value)
    assert (head.out_features, tuple(head.weight.shape), value.config.num_labels) == (1, (1, 32), 1)
    assert head.weight.requires_grad
    found, expected = (token_scores_of(one, examples) for one in (value, model))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    # A checkpoint of it is one of a single head.
    save_model(value, tokenizer, folder.parent / "value")
    assert AutoModelForSequenceClassification.from_pretrained(folder.parent / "value").config.num_labels == 1


def test_a_classifier_of_texts_is_no_reward_model(make_llama, tokenizer, tmp_path):
    config = make_llama().config
    config.num_labels = 2
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"wrongly shaped weights: score.weight"):
        load_scalar_model(ModelSource(str(tmp_path)), tokenizer)
