"""Sampled responses: right distribution, right logprobs, and nothing but their address decides them."""

from collections import Counter
from itertools import chain

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MistralConfig, MistralForCausalLM

from alignpipe.config import SamplingConfig
from alignpipe.data.examples import Example
from alignpipe.errors import ConfigError
from alignpipe.rollout import decoder
from alignpipe.rollout import generate as module
from alignpipe.rollout.cache import GROUPED
from alignpipe.rollout.generate import generate
from alignpipe.rollout.score import response_logprobs

NEVER = (10**6,)


def make_mistral():
    """Looks back 6 tokens, which its own cache alone knows how to do."""
    torch.manual_seed(0)
    settings = {"vocab_size": 640, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    return MistralForCausalLM(MistralConfig(**settings, sliding_window=6)).eval()


@pytest.fixture(params=["llama", "gpt2", "mistral"])
def model(request, make_llama, make_gpt2):
    return {"llama": make_llama, "gpt2": make_gpt2, "mistral": make_mistral}[request.param]()


def make_prompts(count, seed=0, longest=12):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(4, 600, (n,), generator=generator).tolist() for n in lengths]


def sample(model, prompts, **changes):
    settings = {
        "num_samples": 2,
        "max_new_tokens": 10,
        "stop_ids": tuple(range(60)),
        "pad_id": 0,
        "temperature": 1.0,
        "seed": 0,
    }
    return generate(model, prompts, **{**settings, **changes})


def ids_of(rollout):
    return [[sample.ids for sample in row] for row in rollout]


def test_first_tokens_follow_the_softmax(make_llama):
    model = make_llama()
    prompt = [5, 99, 300]
    count = 4000
    found = sample(model, [prompt], num_samples=count, max_new_tokens=1, temperature=1.3, batch_size=count)
    frequencies = torch.tensor([s.ids[0] for s in found[0]]).bincount(minlength=640) / count
    expected = (model(torch.tensor([prompt])).logits[0, -1] / 1.3).softmax(-1)[:640]
    deviation = (expected * (1 - expected) / count).sqrt()
    assert expected.max() > 0.01
    assert (frequencies - expected).abs().max() < 5 * deviation.max()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_those_of_a_training_forward(model, temperature):
    prompts = make_prompts(9)
    rollout = sample(model, prompts, temperature=temperature)
    rows = [(prompt, s) for prompt, row in zip(prompts, rollout, strict=True) for s in row]
    examples = [Example(p + s.ids, [False] * len(p) + [True] * len(s.ids)) for p, s in rows]
    expected = response_logprobs(model, examples, 0, temperature=temperature)
    for (prompt, s), row in zip(rows, expected, strict=True):
        start = len(prompt) - 1
        torch.testing.assert_close(
            torch.tensor(s.logprobs), row[start : start + len(s.ids)], atol=1e-5, rtol=1e-5
        )


def test_responses_end_with_their_first_stop_token(model):
    stops = set(range(60))
    rollout = sample(model, make_prompts(20), num_samples=3)
    samples = [s for row in rollout for s in row]
    assert {s.finished for s in samples} == {True, False}
    for s in samples:
        assert len(s.ids) == len(s.logprobs)
        assert not stops.intersection(s.ids[:-1])
        assert s.finished == (s.ids[-1] in stops)
        assert s.finished or len(s.ids) == 10


def test_a_stop_token_at_the_limit_finishes(make_llama):
    model = make_llama()
    free = sample(model, [[5, 6]], num_samples=1, stop_ids=NEVER, max_new_tokens=4)[0][0]
    stopped = sample(model, [[5, 6]], num_samples=1, stop_ids=(free.ids[3],), max_new_tokens=4)[0][0]
    assert free.ids.index(free.ids[3]) == 3
    assert not free.finished
    assert stopped.finished
    assert stopped.ids == free.ids


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_batch_size_does_not_change_what_is_drawn(model, batch_size):
    prompts = make_prompts(5)
    expected = ids_of(sample(model, prompts, num_samples=3, batch_size=1000))
    assert ids_of(sample(model, prompts, num_samples=3, batch_size=batch_size)) == expected


def test_order_and_company_do_not_change_what_is_drawn(model):
    prompts = make_prompts(8)
    expected = ids_of(sample(model, prompts))
    order = [5, 2, 7, 0]
    found = ids_of(sample(model, [prompts[i] for i in order], prompt_ids=order))
    assert found == [expected[i] for i in order]


def test_samples_of_one_prompt_are_those_of_a_larger_draw(model):
    prompts = make_prompts(5)
    assert [row[:2] for row in ids_of(sample(model, prompts, num_samples=6))] == ids_of(
        sample(model, prompts)
    )


def test_a_prompt_among_longer_ones_draws_what_it_draws_alone(model):
    prompts = [[7, 8, 9], list(range(4, 44))]
    together = ids_of(sample(model, prompts, num_samples=4, batch_size=8))
    alone = ids_of(sample(model, prompts[:1], num_samples=4))
    assert together[0] == alone[0]
    assert ids_of(sample(model, prompts, num_samples=4, batch_size=8, pad_id=77)) == together


def assert_same(found, expected):
    assert ids_of(found) == ids_of(expected)
    for one, other in zip(chain(*found), chain(*expected), strict=True):
        assert one.finished == other.finished
        torch.testing.assert_close(
            torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_refilled_slots_draw_what_no_refill_and_each_prompt_alone_do(model, num_samples, batch_size):
    prompts = make_prompts(7, longest=40)
    settings = {"num_samples": num_samples, "max_new_tokens": 40}
    together = sample(model, prompts, batch_size=1000, **settings)
    assert_same(sample(model, prompts, batch_size=batch_size, **settings), together)
    alone = [sample(model, [prompt], prompt_ids=[i], **settings)[0] for i, prompt in enumerate(prompts)]
    assert_same(alone, together)


def test_a_prompt_of_many_samples_draws_what_as_many_prompts_do(make_llama):
    model, prompt = make_llama(), make_prompts(1, longest=40)[0]
    shared = sample(model, [prompt], num_samples=8, max_new_tokens=40)
    for k in range(8):
        # The last of k + 1 samples, one at a time: nothing is shared with company.
        alone = sample(model, [prompt], num_samples=k + 1, max_new_tokens=40, batch_size=1)
        assert_same([[alone[0][k]]], [[shared[0][k]]])


def test_prompts_are_computed_once_and_a_few_at_a_time(make_llama, monkeypatch):
    model, prompts = make_llama(), [[5, 6, 7 + i] * 3 for i in range(6)]
    rows = []
    model.register_forward_pre_hook(lambda *call: rows.append(call[-1]["input_ids"].shape), with_kwargs=True)
    monkeypatch.setattr(decoder, "PREFILL_TOKENS", 20)
    sample(model, prompts, num_samples=4, batch_size=3)
    assert [shape for shape in rows if shape[1] > 1] == [(2, 8)] * 3


def test_slots_are_full_while_prompts_wait(make_llama):
    rows = []
    model = make_llama()
    model.register_forward_pre_hook(lambda *call: rows.append(call[-1]["input_ids"].shape), with_kwargs=True)
    found = sample(model, make_prompts(24), num_samples=1, batch_size=4, max_new_tokens=20)
    steps = [count for count, width in rows if width == 1]
    lengths = sorted(len(s.ids) for s in chain(*found))
    assert len(set(lengths)) > 5
    assert sum(steps) == sum(lengths)
    # Only the last ones leave slots empty: no more steps than the longest takes.
    assert steps[: -lengths[-1]] == [4] * (len(steps) - lengths[-1])


@pytest.mark.parametrize("every", [3, 100])
def test_looking_seldom_at_what_has_ended_changes_nothing(model, monkeypatch, every):
    prompts = make_prompts(9)
    expected = sample(model, prompts, num_samples=3, batch_size=5)
    monkeypatch.setattr(module, "LOOK_EVERY", {"cpu": every})
    assert_same(sample(model, prompts, num_samples=3, batch_size=5), expected)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_responses_of_one_token(model, batch_size):
    prompts = make_prompts(5)
    settings = {"num_samples": 2, "batch_size": batch_size}
    long = sample(model, prompts, stop_ids=NEVER, **settings)
    short = sample(model, prompts, stop_ids=NEVER, max_new_tokens=1, **settings)
    stopped = sample(model, prompts, stop_ids=tuple(range(640)), **settings)
    assert ids_of(short) == ids_of(stopped) == [[ids[:1] for ids in row] for row in ids_of(long)]
    assert not any(s.finished for s in chain(*short))
    assert all(s.finished for s in chain(*stopped))


def test_prompts_of_one_token_alone(model):
    prompts = [[7], [9]]
    expected = [model(torch.tensor([prompt])).logits[0, -1].argmax().item() for prompt in prompts]
    found = sample(model, prompts, temperature=0, stop_ids=NEVER)
    assert [[ids[0] for ids in row] for row in ids_of(found)] == [[token] * 2 for token in expected]


def test_attention_comes_back_as_it_was(make_llama):
    model = make_llama()

    def stop():
        assert model.config._attn_implementation == GROUPED
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, make_prompts(5), on_batch=stop)
    assert model.config._attn_implementation == "sdpa"


def test_sampling_of_a_stage_says_what_its_configuration_does(make_llama, tokenizer):
    model, prompts, indices = make_llama(), make_prompts(4), [3, 1]
    config = SamplingConfig(max_response_length=10, temperature=0.7, seed=5, generation_batch_size=3)
    found = module.sample(model, tokenizer, prompts, indices, config, num_samples=2, step=2)
    expected = sample(
        model,
        prompts,
        temperature=0.7,
        seed=5,
        step=2,
        stop_ids=tokenizer.stop_ids,
        pad_id=tokenizer.pad_id,
    )
    assert ids_of(found) == [ids_of(expected)[index] for index in indices]


def test_seed_step_and_prompt_index_each_draw_anew(make_llama):
    model, prompts = make_llama(), [[5, 6, 7]] * 2
    base = ids_of(sample(model, prompts, stop_ids=NEVER))
    assert base[0] != base[1]
    assert base[0][0] != base[0][1]
    for changes in ({"seed": 1}, {"step": 1}, {"prompt_ids": [2, 3]}):
        other = ids_of(sample(model, prompts, stop_ids=NEVER, **changes))
        assert all(a != b for a, b in zip(chain(*base), chain(*other), strict=True))


@pytest.mark.parametrize("temperature", [None, 0])
def test_greedy_equals_transformers_generate(model, temperature):
    prompts = make_prompts(6)
    found = ids_of(sample(model, prompts, num_samples=1, temperature=temperature, stop_ids=NEVER))
    for prompt, row in zip(prompts, found, strict=True):
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert row[0] == output[0, len(prompt) :].tolist()


def test_eager_attention_draws_what_sdpa_draws(make_llama):
    prompts = make_prompts(6)
    model = make_llama()
    expected = ids_of(sample(model, prompts))
    model.set_attn_implementation("eager")
    assert ids_of(sample(model, prompts)) == expected


def test_sliding_windows_are_kept():
    model = make_mistral()
    prompts = make_prompts(5, longest=9)
    found = ids_of(sample(model, prompts, num_samples=1, temperature=0, stop_ids=NEVER))
    for prompt, row in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(10):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert row[0] == ids[len(prompt) :]


def test_the_model_comes_back_in_the_mode_it_had_and_can_be_trained(make_llama):
    model = make_llama().train()
    sample(model, make_prompts(3))
    assert model.training
    model(torch.tensor([[5, 6]]), labels=torch.tensor([[5, 6]])).loss.backward()


def test_dropout_plays_no_part_in_sampling(make_gpt2):
    model = make_gpt2(resid_pdrop=0.5, embd_pdrop=0.5)
    expected = ids_of(sample(model, make_prompts(3)))
    assert ids_of(sample(model.train(), make_prompts(3))) == expected


def test_on_batch_is_called_whenever_responses_have_ended_and_may_stop(model):
    calls = []
    sample(model, make_prompts(5), stop_ids=NEVER, batch_size=4, on_batch=lambda: calls.append(1))
    assert len(calls) == 3

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(model, make_prompts(5), on_batch=stop)


def test_more_tokens_than_positions_is_a_config_error(make_gpt2):
    with pytest.raises(
        ConfigError, match=r"120 tokens after a prompt of 9 do not fit into the 128 positions"
    ):
        sample(make_gpt2(), [[5] * 9], max_new_tokens=120)


def test_no_prompts_give_no_responses(make_llama):
    assert sample(make_llama(), []) == []


CASTS = {torch.ops.aten._to_copy.default, torch.ops.aten.to.dtype}


class Casts(TorchDispatchMode):
    """Counts how often each weight of a model was turned into another dtype, by name."""

    def __init__(self, model):
        super().__init__()
        self.names = {weight.data_ptr(): name for name, weight in model.named_parameters()}
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        # Under inference mode `to` comes as it is called, else as what it is made of.
        if func in CASTS and found.dtype != args[0].dtype and args[0].data_ptr() in self.names:
            self.counts[self.names[args[0].data_ptr()]] += 1
        return found


def test_frozen_weights_are_turned_into_16_bits_once_for_all_tokens(model):
    prompts = make_prompts(3)
    with torch.autocast("cpu", torch.bfloat16):
        learning = sample(model, prompts, stop_ids=NEVER)
    model.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16), Casts(model) as casts:
        found = sample(model, prompts, stop_ids=NEVER)
    assert ids_of(found) == ids_of(learning)
    assert casts.counts and set(casts.counts.values()) == {1}
    assert not any(weight.requires_grad for weight in model.parameters())
