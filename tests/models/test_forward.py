"""batch_logprobs against a whole forward."""

import pytest
import torch

from alignpipe.data.collate import collate
from alignpipe.data.encoding import Example
from alignpipe.losses.logprobs import token_logprobs
from alignpipe.models.forward import batch_logprobs


def rows():
    torch.manual_seed(0)
    sizes = [(3, 4), (6, 1), (2, 7)]
    return [Example(torch.randint(4, 600, (p + r,)).tolist(), [False] * p + [True] * r) for p, r in sizes]


@pytest.mark.parametrize("architecture_name", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_batch_logprobs_equal_the_whole_forward_under_the_mask(
    make_llama, make_gpt2, architecture_name, temperature
):
    model = {"llama": make_llama, "gpt2": make_gpt2}[architecture_name]()
    batch = collate(rows(), pad_id=0)
    found = batch_logprobs(model, batch, temperature)
    whole = token_logprobs(model(batch.input_ids).logits, batch.input_ids, temperature)
    torch.testing.assert_close(found, whole * batch.loss_mask[:, 1:])
    found.sum().backward()
    gradient = model.get_input_embeddings().weight.grad.clone()
    model.zero_grad()
    (whole * batch.loss_mask[:, 1:]).sum().backward()
    torch.testing.assert_close(gradient, model.get_input_embeddings().weight.grad, atol=1e-5, rtol=1e-4)


def test_batch_logprobs_do_not_depend_on_company_or_padding(make_llama):
    model, examples = make_llama(), rows()
    together = batch_logprobs(model, collate(examples, pad_id=0)).sum(1)
    alone = torch.cat([batch_logprobs(model, collate([row], pad_id=77)).sum(1) for row in examples])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-5)
