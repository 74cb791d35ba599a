"""Scores, values and logprobs of given sequences: batches of like length change nothing."""

import pytest
import torch

from alignpipe.data.collate import collate
from alignpipe.data.examples import Example
from alignpipe.errors import CheckpointError
from alignpipe.losses.logprobs import token_logprobs
from alignpipe.models.loading import ModelSource
from alignpipe.models.scalar_head import load_scalar_model, sequence_scores, token_scores
from alignpipe.rollout.score import (
    Normalizer,
    collapse,
    response_logprobs,
    response_scores,
    response_values,
    sequence_logprobs,
)


@pytest.fixture
def examples():
    torch.manual_seed(0)
    sizes = [(3, 4), (6, 1), (2, 7), (1, 1), (5, 5), (2, 2), (8, 3)]
    return [Example(torch.randint(4, 600, (p + r,)).tolist(), [False] * p + [True] * r) for p, r in sizes]


@pytest.fixture
def reward_model(make_llama, tokenizer, tmp_path):
    make_llama().save_pretrained(tmp_path)
    return load_scalar_model(ModelSource(str(tmp_path)), tokenizer, seed=0)


def test_response_scores_come_in_the_given_order_for_any_batch_size(reward_model, examples):
    expected = torch.stack([sequence_scores(reward_model, collate([e], 0))[0] for e in examples])
    for batch_size in (1, 3, 100):
        found = response_scores(reward_model, examples, 0, batch_size)
        torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)
        assert not found.requires_grad


def test_response_scores_are_shifted_and_scaled(reward_model, examples):
    raw = response_scores(reward_model, examples, 0)
    normal = response_scores(reward_model, examples, 0, normalizer=Normalizer.fit(raw))
    assert normal.mean().item() == pytest.approx(0, abs=1e-6)
    assert normal.std(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(Normalizer(2.0, 4.0)(torch.tensor([10.0])), torch.tensor([2.0]))


def test_response_values_are_read_before_each_response_token(reward_model, examples):
    found = response_values(reward_model, examples, 0, batch_size=2)
    mask = collate(examples, 0).loss_mask[:, 1:]
    assert found.shape == mask.shape
    assert (found[~mask] == 0).all()
    for row, example in enumerate(examples):
        batch = collate([example], 0)
        scores = token_scores(reward_model, batch, torch.ones_like(batch.input_ids) > 0)[0].detach()
        first = example.mask.index(True)
        expected = scores[first - 1 : len(example.ids) - 1]
        torch.testing.assert_close(found[row][mask[row]], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_response_logprobs_equal_single_forwards(make_llama, examples, temperature):
    policy = make_llama()
    mask = collate(examples, 0).loss_mask[:, 1:]
    for batch_size in (1, 3, 100):
        found = response_logprobs(policy, examples, 0, batch_size, temperature)
        assert found.shape == mask.shape
        assert (found[~mask] == 0).all()
        for row, example in enumerate(examples):
            ids = torch.tensor([example.ids])
            with torch.no_grad():
                whole = token_logprobs(policy(ids).logits, ids, temperature)[0]
            expected = whole[torch.tensor(example.mask[1:])]
            torch.testing.assert_close(found[row][mask[row]], expected, atol=1e-5, rtol=1e-5)
        total = sequence_logprobs(policy, examples, 0, batch_size, temperature)
        torch.testing.assert_close(total, found.sum(1))


def test_results_can_stand_in_a_loss(make_llama, examples):
    policy = make_llama()
    reference = response_logprobs(policy, examples, 0)
    weight = torch.ones_like(reference, requires_grad=True)
    # The gradient of a product needs the other factor to be kept.
    (weight * reference).sum().backward()
    torch.testing.assert_close(weight.grad, reference)


def test_scoring_is_without_dropout_and_leaves_the_model_in_the_mode_it_had(make_gpt2, examples):
    policy = make_gpt2(resid_pdrop=0.5, embd_pdrop=0.5)
    expected = response_logprobs(policy, examples, 0)
    assert torch.equal(response_logprobs(policy.train(), examples, 0), expected)
    assert policy.training


def test_no_examples_give_nothing(make_llama, reward_model):
    assert response_scores(reward_model, [], 0).shape == (0,)
    assert response_logprobs(make_llama(), [], 0).shape == (0, 0)


def test_normalizer_goes_through_the_manifests_metrics():
    normalizer = Normalizer(1.5, 0.25)
    assert Normalizer.from_metrics({"loss": 3.0, **normalizer.as_metrics()}) == normalizer
    assert Normalizer.from_metrics({}) == Normalizer(0.0, 1.0)
    assert Normalizer.fit(torch.full((3,), 7.0)) == Normalizer(7.0, 1.0)


@pytest.mark.parametrize("metrics", [{"reward_mean": 1.0}, {"reward_mean": 0.0, "reward_std": 0.0}])
def test_normalizer_refuses_what_would_divide_by_nothing(metrics):
    with pytest.raises(CheckpointError, match="train the reward model again"):
        Normalizer.from_metrics(metrics)


def test_collapse_takes_deviations_off_the_mean():
    scores = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    assert collapse(scores).tolist() == [2.0, 2.0]
    assert collapse(scores, 0.5).tolist() == [1.5, 2.0]
    # One member is sure of itself.
    assert collapse(scores[:, :1], 3.0).tolist() == [1.0, 2.0]


def test_a_heads_own_level_is_no_disagreement():
    torch.manual_seed(0)
    one = torch.randn(50)
    normalizer = Normalizer.fit(torch.stack([one, one + 7.0], dim=1))
    heads = normalizer.of_heads(torch.stack([one, one + 7.0], dim=1))
    assert heads.std(1, unbiased=False).max() < 1e-5
    assert Normalizer.from_metrics(normalizer.as_metrics()) == normalizer
    # Their mean is what the scores of the mean head are normalised to.
    torch.testing.assert_close(collapse(heads), normalizer(one + 3.5), atol=1e-5, rtol=1e-5)
