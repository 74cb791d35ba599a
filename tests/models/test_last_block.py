"""The last block works where something is read; that nothing else changes, test_attention.py shows."""

import pytest
import torch
from torch import nn

from alignpipe.data.collate import collate
from alignpipe.data.examples import Example
from alignpipe.models import attention, forward, last_block
from alignpipe.models.attention import allow_packing
from alignpipe.models.forward import batch_logprobs, body_states
from alignpipe.models.loading import ModelSource
from alignpipe.models.scalar_head import load_scalar_model, sequence_scores, token_scores
from tests.models.test_attention import ARCHITECTURES, build

PROMPT = [5, 6, 7, 8, 9] * 4
ROWS = [Example.of(PROMPT, response) for response in ([11, 12, 13], [14, 15], [16] * 4)]
# Of 29 tokens; the prompt's last one is read for every response, the responses' last ones for none.
NUM_READ = 1 + 2 + 1 + 3


def widths(model: nn.Module) -> list[int]:
    """How many tokens each feed-forward is given from now on."""
    found: list[int] = []
    blocks = next(child for child in model.base_model.children() if isinstance(child, nn.ModuleList))
    for block in blocks:
        # Behind those that choose tokens.
        block.mlp.register_forward_hook(lambda _, inputs, __: found.append(inputs[0].shape[1]))
    return found


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_last_feed_forward_is_given_what_is_read(kind):
    model = allow_packing(build(kind, "sdpa", **ARCHITECTURES[kind]))
    batch_logprobs(model, collate(ROWS, 0))
    found = widths(model)
    batch_logprobs(model, collate(ROWS, 0))
    assert found == [29, NUM_READ]


def test_a_score_is_read_at_one_token_of_a_row(make_llama, tokenizer, tmp_path):
    make_llama().save_pretrained(tmp_path)
    model = load_scalar_model(ModelSource(str(tmp_path)), tokenizer, seed=0)
    batch = collate(ROWS, 0)
    everywhere = token_scores(model, batch, torch.ones_like(batch.input_ids) > 0)
    found = widths(model)
    scores = sequence_scores(model, batch)
    assert found == [29, 3]
    expected = everywhere.gather(1, batch.lengths[:, None] - 1).squeeze(1)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


class Mixing(nn.Module):
    """A feed-forward that looks at other tokens too."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        mixed: torch.Tensor = self.inner(states.cumsum(1))
        return mixed


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("read", ["responses", "ends", "some", "one"])
def test_what_is_read_and_its_gradients_are_those_of_a_whole_block(make_llama, monkeypatch, read, long):
    model = allow_packing(make_llama(num_hidden_layers=2)).double()
    rows = [Example.of(PROMPT * 2, [11 + at] * (at + (100 if long else 3))) for at in range(4)]
    batch = collate([*rows, Example.of([5, 6], [7, 8, 9])], 0)
    at = {
        "responses": batch.loss_mask,
        "ends": torch.arange(batch.input_ids.shape[1]) == batch.lengths[:, None] - 1,
        "some": torch.rand(batch.input_ids.shape, generator=torch.Generator().manual_seed(0)) < 0.1,
        "one": torch.zeros_like(batch.loss_mask).index_put(
            (torch.tensor(3), torch.tensor(45)), torch.tensor(True)
        ),
    }[read] & (torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None])
    found = []
    for parts in (last_block.last_block(model), {}):
        assert set(parts) in (set(last_block.PARTS), set())
        monkeypatch.setattr(forward, "last_block", lambda _, parts=parts: parts)
        states = body_states(model, batch, at)
        loss = (states * torch.linspace(-1, 1, states.numel()).view(states.shape)).sum()
        found.append((states, torch.autograd.grad(loss, list(model.model.parameters()))))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-12, rtol=1e-12)
    for mine, whole in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(mine, whole, atol=1e-11, rtol=1e-9)


def test_attention_is_asked_for_what_is_read(make_llama, monkeypatch):
    model = allow_packing(make_llama(num_hidden_layers=2))
    asked: list[int] = []
    plain = attention.scaled_dot_product_attention

    def count(query, *args, **kwargs):
        asked.append(query.shape[0] * query.shape[2])
        return plain(query, *args, **kwargs)

    batch = collate(ROWS, 0)
    ends = torch.arange(batch.input_ids.shape[1]) == batch.lengths[:, None] - 1
    body_states(model, batch, ends)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", count)
    body_states(model, batch, ends)
    # Rows of 23, 2 and 4 tokens of their own, padded; then their last ones.
    assert asked == [3 * 23, 3]


def test_a_feed_forward_that_looks_around_is_left_alone_and_what_it_looks_at(make_llama):
    model = allow_packing(make_llama())
    assert list(last_block.last_block(model)) == list(last_block.PARTS)
    other = allow_packing(make_llama())
    other.model.layers[-1].mlp = Mixing(other.model.layers[-1].mlp)
    assert last_block.last_block(other) == {}


def test_weights_over_several_processes_are_not_tried(make_llama, monkeypatch):
    model = allow_packing(make_llama())
    assert last_block.last_block(model)["mlp"] is model.model.layers[-1].mlp
    monkeypatch.setattr(last_block, "is_sharded", lambda _: True)
    assert last_block.last_block(model) == {}


def test_what_is_computed_again_keeps_its_shape(make_llama):
    model = allow_packing(make_llama())
    expected = batch_logprobs(model, collate(ROWS, 0))
    expected.sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    found = batch_logprobs(model, collate(ROWS, 0))
    found.sum().backward()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


def test_nothing_is_left_behind_where_a_forward_fails(make_llama):
    model = allow_packing(make_llama())
    feed_forward = model.model.layers[-1].mlp
    with pytest.raises(RuntimeError), last_block.only_at({"mlp": feed_forward}, torch.tensor([0])):
        raise RuntimeError
    assert not feed_forward._forward_hooks
    assert not feed_forward._forward_pre_hooks
