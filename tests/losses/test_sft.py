"""sft_loss against cross-entropy with ignored labels."""

import torch

from alignpipe.losses.logprobs import token_logprobs
from alignpipe.losses.sft import sft_loss


def test_sft_loss_sum_equals_cross_entropy_over_learnt_tokens():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 5, 9), torch.randint(9, (2, 5))
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    labels = ids[:, 1:].masked_fill(~mask, -100)
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"
    )
    torch.testing.assert_close(sft_loss(token_logprobs(logits, ids), mask).sum(), expected)


def test_sft_loss_gives_no_gradient_to_unlearnt_tokens():
    logprobs = torch.full((1, 3), -2.0, requires_grad=True)
    losses = sft_loss(logprobs, torch.tensor([[False, True, False]]))
    assert losses.tolist() == [[0.0, 2.0, 0.0]]
    losses.sum().backward()
    assert logprobs.grad.tolist() == [[0.0, -1.0, 0.0]]
