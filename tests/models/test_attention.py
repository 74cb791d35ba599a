"""Rows side by side against the same rows padded, over architectures."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)

from alignpipe.data.collate import collate
from alignpipe.data.examples import Example
from alignpipe.models import attention
from alignpipe.models.attention import allow_packing, can_pack
from alignpipe.models.forward import batch_logprobs, mean_hidden

SHAPE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**SHAPE, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
GPT2 = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 12},
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "gemma3_text": {**LLAMA, "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"]},
    "olmo2": LLAMA,
    "phi3": {**LLAMA, "pad_token_id": 0},
    "gpt_neox": {**SHAPE, "intermediate_size": 48},
    "gpt2": GPT2,
    "qwen3_moe": {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
# State that runs along a row would run on into the next one.
RECURRENT: dict[str, dict[str, Any]] = {
    "qwen3_next": {
        **LLAMA,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
}


def build(kind: str, attn_implementation: str, **shape: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **shape)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            # Louder than they are drawn, so that a wrong mask shows.
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> list[int]:
        return torch.randint(3, 99, (count,), generator=generator).tolist()

    prompt = draw(20)
    lengths = [(prompt, 9), (draw(4), 30), (prompt, 5), (draw(1), 2), (prompt, 14)]
    return [Example(start + draw(n), [False] * len(start) + [True] * n) for start, n in lengths]


def nested() -> list[Example]:
    """Rows of which one begins as another that begins as a third, two alike, and one that another begins with."""
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> list[int]:
        return torch.randint(3, 99, (count,), generator=generator).tolist()

    opening = draw(17)
    first, second = opening + draw(3), opening + draw(24)
    answer = draw(9)
    pairs = [
        *((first, answer), (second, draw(5)), (first, answer[:4] + draw(30)), (second, draw(12))),
        *((first, answer), (first, answer[:6]), (opening, draw(2))),
    ]
    return [Example.of(prompt, response) for prompt, response in pairs]


def measure(model: PreTrainedModel, rows: list[Example] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and the gradients of their sum in one row."""
    model.zero_grad()
    found = batch_logprobs(model, collate(rows or examples(), 0))
    (found * torch.linspace(0, 1, found.numel()).view_as(found)).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return found.detach(), torch.cat(grads)


@pytest.mark.parametrize("rows", [examples, nested])
@pytest.mark.parametrize("short", [96, 0])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_packed_rows_and_shared_beginnings_change_no_logprob_and_no_gradient(monkeypatch, kind, short, rows):
    monkeypatch.setattr(attention, "SHORT", short)
    padded = build(kind, "eager", **ARCHITECTURES[kind])
    model = allow_packing(build(kind, "sdpa", **ARCHITECTURES[kind]))
    assert can_pack(model)
    assert not can_pack(padded)
    expected, found = measure(padded, rows()), measure(model, rows())
    torch.testing.assert_close(found[0], expected[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=2e-5 * float(expected[1].abs().max()), rtol=1e-4)


@pytest.mark.parametrize("short", [96, 0])
def test_gradient_of_many_responses_to_one_prompt_has_the_same_bits_each_time_on_two_threads(
    monkeypatch, short
):
    monkeypatch.setattr(attention, "SHORT", short)
    model = allow_packing(build("llama", "sdpa", **LLAMA))
    prompt = list(range(3, 63))
    rows = [Example([*prompt, *([3 + n] * 20)], [False] * 60 + [True] * 20) for n in range(48)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, *others = (measure(model, rows)[1] for _ in range(10))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first, other) for other in others)


def test_packed_embeddings_are_those_of_each_row_alone():
    model = allow_packing(build("llama", "sdpa", **LLAMA))
    rows = examples()
    together = mean_hidden(model, collate(rows, 0))
    alone = torch.cat([mean_hidden(model, collate([row], 0)) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("short", [96, 0])
def test_a_change_in_one_response_is_seen_by_no_other_row(monkeypatch, short):
    monkeypatch.setattr(attention, "SHORT", short)
    model = allow_packing(build("llama", "sdpa", **LLAMA))
    rows = examples()
    before = batch_logprobs(model, collate(rows, 0))
    rows[0].ids[20] = (rows[0].ids[20] + 1) % 99
    after = batch_logprobs(model, collate(rows, 0))
    torch.testing.assert_close(after[1:], before[1:], atol=0, rtol=0)
    assert (after[0] - before[0]).abs().max() > 0.1


def test_nothing_is_padded_and_what_rows_begin_with_is_read_once():
    model = allow_packing(build("llama", "sdpa", **LLAMA))
    read = []
    model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: read.append(inputs[0].shape))
    batch_logprobs(model, collate(examples(), 0))
    batch_logprobs(model, collate(nested(), 0))
    # Of two rows alike the last token, of one that another begins with too; of the last row its response.
    nested_tokens = (20 + 9) + (24 + 5) + 30 + 12 + 1 + 1 + 2
    assert read == [(1, 20 + 9 + 34 + 5 + 3 + 14), (1, nested_tokens)]


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_layers_are_padded(kind):
    model = allow_packing(build(kind, "sdpa", **RECURRENT[kind]))
    assert not can_pack(model)
    rows = examples()
    together = batch_logprobs(model, collate(rows, 0)).sum(1)
    alone = torch.cat([batch_logprobs(model, collate([row], 0)).sum(1) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-4)


def test_checkpointed_layers_see_the_branches_again_in_the_backward_pass():
    plain = allow_packing(build("llama", "sdpa", **LLAMA)).train()
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(measure(saving), measure(plain), atol=1e-6, rtol=1e-6)


def test_outside_of_a_packed_forward_the_attention_is_that_of_transformers():
    plain = build("llama", "sdpa", **LLAMA)
    model = allow_packing(copy.deepcopy(plain))
    ids = torch.randint(3, 99, (2, 12))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for given in (None, mask):
        expected = plain(input_ids=ids, attention_mask=given).logits
        assert torch.equal(model(input_ids=ids, attention_mask=given).logits, expected)


def test_flash_attention_is_told_where_queries_and_keys_of_each_row_begin(monkeypatch):
    given: dict[str, Any] = {}

    def flash(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        given.update(kwargs, keys=key.shape[2])
        return query.transpose(1, 2), None

    monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    model = build("llama", "sdpa", **LLAMA)
    model.config._attn_implementation = attention.PACKED["flash_attention_2"]
    batch_logprobs(model, collate(examples(), 0))
    assert given["cu_seq_lens_q"].tolist() == [0, 29, 63, 68, 71, 85]
    assert given["cu_seq_lens_k"].tolist() == [0, 29, 63, 88, 91, 125]
    assert (given["max_length_q"], given["max_length_k"], given["keys"]) == (34, 34, 125)
