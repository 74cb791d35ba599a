"""token_logprobs, entropy and masked sums against plain torch and numbers by hand."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from alignpipe.losses import logprobs as module
from alignpipe.losses.logprobs import (
    entropy,
    head_logprobs,
    masked_mean,
    masked_sum,
    masked_whiten,
    token_logprobs,
)


def plain_logprobs(logits, ids, temperature=1.0):
    full = (logits[:, :-1].float() / temperature).log_softmax(-1)
    return full.gather(-1, ids[:, 1:, None]).squeeze(-1)


def test_token_logprobs_by_hand():
    # Odds 1 : 3 at position 0 and 1 : 1 at position 1; the tokens that follow are 1 and 0.
    logits = torch.tensor([[[0.0, math.log(3.0)], [5.0, 5.0], [9.0, 0.0]]])
    found = token_logprobs(logits, torch.tensor([[0, 1, 0]]))
    torch.testing.assert_close(found, torch.tensor([[math.log(0.75), math.log(0.5)]]))


def test_token_logprobs_temperature_sharpens_the_odds():
    # At temperature 1/2 the odds 1 : 3 become 1 : 9.
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]]])
    found = token_logprobs(logits, torch.tensor([[0, 1]]), temperature=0.5)
    torch.testing.assert_close(found, torch.tensor([[math.log(0.9)]]))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("block", [2**22, 37, 1])
def test_token_logprobs_and_gradient_equal_log_softmax_for_any_block_size(monkeypatch, temperature, block):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11, requires_grad=True)
    ids = torch.randint(11, (3, 5))
    weights = torch.randn(3, 4)
    found = token_logprobs(logits, ids, temperature)
    (gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    expected = plain_logprobs(logits, ids, temperature)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def test_token_logprobs_gradient_passes_gradcheck():
    torch.manual_seed(1)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(5, (2, 3))
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, ids, 1.3), (logits,))


def test_token_logprobs_of_bfloat16_are_float32_and_normalised():
    torch.manual_seed(2)
    logits = torch.randn(1, 2, 7, dtype=torch.bfloat16)
    found = [token_logprobs(logits, torch.tensor([[0, token]])) for token in range(7)]
    assert found[0].dtype == torch.float32
    assert torch.cat(found).exp().sum().item() == pytest.approx(1.0, abs=1e-6)


def test_token_logprobs_gradient_keeps_the_dtype_of_the_logits():
    logits = torch.randn(1, 3, 7, dtype=torch.bfloat16, requires_grad=True)
    token_logprobs(logits, torch.tensor([[0, 1, 2]])).sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    assert logits.grad[:, -1].abs().max() == 0


def test_token_logprobs_are_finite_at_extreme_logits():
    logits = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]]], requires_grad=True)
    found = token_logprobs(logits, torch.tensor([[0, 1]]))
    found.sum().backward()
    assert found.item() == pytest.approx(-2e4)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kept", [2**24, 0])
@pytest.mark.parametrize("block", [2**22, 21])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("has_bias", [True, False])
def test_head_logprobs_and_gradients_are_those_of_the_whole_logits(
    monkeypatch, kept, block, temperature, has_bias
):
    monkeypatch.setattr(module, "KEPT_ELEMENTS", kept)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    torch.manual_seed(6)
    hidden = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True) if has_bias else None
    targets, weights = torch.randint(0, 7, (8,)), torch.randn(8, dtype=torch.float64)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]
    logits = torch.nn.functional.linear(hidden, weight, bias) / temperature
    expected = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    gradients = torch.autograd.grad((weights * expected).sum(), leaves)
    found = head_logprobs(hidden, weight, bias, targets, temperature)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad((weights * found).sum(), leaves), gradients)


@pytest.mark.parametrize("kept", [0, 2**24])
def test_head_logprobs_have_the_same_gradients_in_a_second_pass(kept, monkeypatch):
    monkeypatch.setattr(module, "KEPT_ELEMENTS", kept)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 5 * 11)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((13, 7), (11, 7), (11,))
    )
    found = head_logprobs(hidden, weight, bias, torch.arange(13) % 11)
    first, again = (
        torch.autograd.grad(found.square().sum(), (hidden, weight, bias), retain_graph=True) for _ in "12"
    )
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_head_logprobs_hold_no_logits_of_many_tokens(monkeypatch):
    monkeypatch.setattr(module, "KEPT_ELEMENTS", 0)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 40)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
            return out

    hidden, weight = torch.randn(50, 3, requires_grad=True), torch.randn(20, 3, requires_grad=True)
    with Watch():
        head_logprobs(hidden, weight, None, torch.zeros(50, dtype=torch.long)).sum().backward()
    assert largest == 150


def test_head_logprobs_under_autocast_take_its_products_and_give_float32():
    torch.manual_seed(7)
    hidden, weight = torch.randn(4, 64, requires_grad=True), torch.randn(9, 64, requires_grad=True)
    targets = torch.arange(4)
    with torch.autocast("cpu", torch.bfloat16):
        found = head_logprobs(hidden, weight, None, targets)
        logits = torch.nn.functional.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16
    expected = logits.float().log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    found.sum().backward()
    assert (hidden.grad.dtype, weight.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("block", [2**22, 3])
def test_entropy_of_uniform_and_certain_distributions(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    logits = torch.tensor(
        [[[0.0, 0.0, 0.0, 0.0], [1000.0, 0.0, 0.0, 0.0]], [[7.0, 7.0, -1e9, -1e9], [0.0] * 4]]
    )
    found = entropy(logits)
    torch.testing.assert_close(found, torch.tensor([[math.log(4), 0.0], [math.log(2), math.log(4)]]))


@pytest.mark.parametrize("block", [2**22, 10])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_has_the_gradient_of_its_formula_whatever_the_blocks(monkeypatch, block, temperature):
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", block)
    torch.manual_seed(5)
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, dtype=torch.float64)
    logprobs = (logits / temperature).log_softmax(-1)
    expected = -(logprobs.exp() * logprobs).sum(-1)
    (gradient,) = torch.autograd.grad((weights * expected).sum(), logits)
    found = entropy(logits, temperature)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad((weights * found).sum(), logits)[0], gradient)


def test_masked_sums_ignore_what_is_outside_even_infinities():
    values = torch.tensor([[1.0, 2.0, float("inf")], [4.0, float("nan"), -6.0]])
    mask = torch.tensor([[True, True, False], [True, False, True]])
    assert masked_sum(values, mask).item() == 1.0
    assert masked_mean(values, mask).item() == 0.25
    assert masked_mean(values, mask, dim=1).tolist() == [1.5, -1.0]
    assert masked_mean(values, torch.zeros_like(mask)).item() == 0.0


def test_masked_whiten_has_mean_zero_and_variance_one_whatever_the_padding():
    torch.manual_seed(3)
    values = torch.randn(4, 6) * 5 + 3
    mask = torch.rand(4, 6) > 0.4
    white = masked_whiten(values, mask)
    assert white[mask].mean().item() == pytest.approx(0.0, abs=1e-6)
    assert white[mask].var(unbiased=False).item() == pytest.approx(1.0, abs=1e-5)
    assert white[~mask].abs().max() == 0
    padded = masked_whiten(
        torch.nn.functional.pad(values, (0, 3), value=1e6), torch.nn.functional.pad(mask, (0, 3), value=False)
    )
    torch.testing.assert_close(padded[:, :6], white)


def test_masked_whiten_can_keep_the_mean():
    values, mask = torch.tensor([[1.0, 5.0, 99.0]]), torch.tensor([[True, True, False]])
    torch.testing.assert_close(masked_whiten(values, mask, keep_mean=True), torch.tensor([[2.0, 4.0, 0.0]]))


def test_masked_whiten_of_equal_values_is_zero():
    assert masked_whiten(torch.full((2, 2), 7.0), torch.ones(2, 2, dtype=torch.bool)).abs().max() == 0
