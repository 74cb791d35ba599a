"""batch_logprobs against a whole forward."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alignpipe.data.collate import collate
from alignpipe.data.examples import Example
from alignpipe.losses.logprobs import token_logprobs
from alignpipe.models import forward
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


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_an_architecture_that_bends_its_logits_keeps_them(softcap):
    shape = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model("gemma2", **shape, **heads, final_logit_softcapping=softcap)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    batch = collate(rows(), pad_id=0)
    found = batch_logprobs(model, batch)
    assert forward._PLAIN[model] is (softcap is None)
    whole = token_logprobs(model(batch.input_ids).logits, batch.input_ids)
    torch.testing.assert_close(found, whole * batch.loss_mask[:, 1:])
