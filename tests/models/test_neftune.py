"""NEFTune's noise: its bounds and spread, where it is off, and what it may depend on."""

from collections.abc import Callable
from math import sqrt

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignpipe.data.collate import collate
from alignpipe.data.examples import Example
from alignpipe.models.attention import allow_packing, can_pack
from alignpipe.models.forward import batch_logprobs
from alignpipe.models.neftune import noisy_embeddings, row_noise

ROWS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14]]
ALPHA = 5.0


def _embeddings(model: PreTrainedModel, rows: list[list[int]], **changes: float) -> Tensor:
    """What the first block reads, (B, T, d)."""
    seen: list[Tensor] = []
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    settings = {"alpha": ALPHA, "seed": 0, "step": 3} | changes
    with noisy_embeddings(model, rows, settings["alpha"], int(settings["seed"]), int(settings["step"])):
        handle = model.get_input_embeddings().register_forward_hook(lambda *hooked: seen.append(hooked[2]))
        model(input_ids=ids, use_cache=False)
        handle.remove()
    return seen[0].detach()


def _noise(model: PreTrainedModel, rows: list[list[int]], **changes: float) -> Tensor:
    return _embeddings(model, rows, **changes) - _embeddings(model, rows, alpha=0.0)


@pytest.mark.parametrize("make", ["make_llama", "make_gpt2"])
def test_noise_of_a_row_keeps_the_bound_and_padding_has_none(
    make: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(make)().train()
    noise = _noise(model, ROWS)
    for row, found in zip(ROWS, noise, strict=True):
        bound = ALPHA / sqrt(len(row) * noise.shape[-1])
        assert found[: len(row)].abs().max() <= bound * (1 + 1e-5)
        assert found[: len(row)].abs().max() > 0.9 * bound
        assert not found[len(row) :].any()


def test_noise_of_a_row_is_the_same_beside_others_and_under_padding(
    make_llama: Callable[..., PreTrainedModel],
) -> None:
    padded, packed = make_llama().train(), allow_packing(make_llama().train())
    batch = collate([Example(row, [False] + [True] * (len(row) - 1)) for row in ROWS], 0)
    found = []
    for model in (padded, packed):
        with noisy_embeddings(model, ROWS, ALPHA, 0, 3):
            found.append(batch_logprobs(model, batch))
    assert can_pack(packed) and not can_pack(padded)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert (found[0] - batch_logprobs(padded, batch)).abs().max() > 0.01


def test_noise_is_uniform_with_the_deviation_of_the_formula() -> None:
    like = torch.zeros(1, 512, 64)
    row = list(range(512))
    noise = row_noise(row, like, ALPHA, 0, 0)
    scale = ALPHA / sqrt(512 * 64)
    assert noise.std().item() == pytest.approx(scale / sqrt(3), rel=0.01)
    assert noise.mean().item() == pytest.approx(0.0, abs=scale * 0.01)
    # The length of the noise of a whole row, about alpha / sqrt(3), whatever the row's length.
    assert noise.norm().item() == pytest.approx(ALPHA / sqrt(3), rel=0.01)
    assert row_noise([1, 2], like, ALPHA, 0, 0).norm().item() == pytest.approx(ALPHA / sqrt(3), rel=0.15)


def test_noise_is_off_in_evaluation_and_gone_after_the_block(
    make_llama: Callable[..., PreTrainedModel],
) -> None:
    model = make_llama().eval()
    assert not _noise(model, ROWS).any()
    model.train()
    assert _noise(model, ROWS).any()
    assert not model.get_input_embeddings()._forward_hooks


def test_noise_depends_on_seed_step_and_row_alone(make_llama: Callable[..., PreTrainedModel]) -> None:
    model = make_llama().train()
    together = _noise(model, ROWS)
    for index, row in enumerate(ROWS):
        torch.testing.assert_close(_noise(model, [row])[0], together[index, : len(row)], rtol=0, atol=1e-6)
    turned = _noise(model, ROWS[::-1])
    torch.testing.assert_close(turned.flip(0), together, rtol=0, atol=1e-6)
    for other in ({"seed": 1}, {"step": 4}):
        assert not torch.allclose(_noise(model, ROWS, **other), together)
    state = torch.get_rng_state()
    _noise(model, ROWS)
    assert torch.equal(state, torch.get_rng_state()), "it draws from no shared generator"
