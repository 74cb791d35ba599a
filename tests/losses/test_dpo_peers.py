"""The losses of dpo against TRL's own code on the same tensors."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignpipe.config import PREFERENCE_LOSSES
from alignpipe.losses.dpo import LOSSES, Responses, kl_baseline, nll

pytest.importorskip("trl", minversion="1.16", reason="TRL is a test-only extra")

BETA, SMOOTHING = 0.3, 0.2
PROMPT = 3
LENGTHS = torch.tensor([4, 7, 2, 5, 6, 1, 3, 7])


class Accelerator:
    """Of one process."""

    device = torch.device("cpu")

    def gather(self, value: Tensor) -> Tensor:
        return value

    gather_for_metrics = gather


def _token_logprobs(seed: int, lengths: Tensor) -> Tensor:
    """Log-probs of the tokens of prompts and responses, zero outside of the responses, (N, T - 1)."""
    width = PROMPT + int(lengths.max()) - 1
    values = -2 * torch.rand(len(lengths), width, generator=torch.Generator().manual_seed(seed))
    columns = torch.arange(width)
    mask = (columns >= PROMPT - 1) & (columns < PROMPT - 1 + lengths[:, None])
    return values * mask


def _completion_mask(lengths: Tensor) -> Tensor:
    columns = torch.arange(PROMPT + int(lengths.max()))
    return ((columns >= PROMPT) & (columns < PROMPT + lengths[:, None])).long()


def _trainer(**fields: Any) -> Any:
    settings = {
        "model": SimpleNamespace(training=True),
        "accelerator": Accelerator(),
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "loss_weights": [1.0],
        "beta": BETA,
        "label_smoothing": SMOOTHING,
        "use_weighting": False,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_total_train_tokens": 0,
        "_tp_size": 1,
    }
    return SimpleNamespace(**{**settings, **fields})


def _model(logprobs: Tensor) -> Any:
    flat = torch.zeros_like(logprobs)
    output = SimpleNamespace(log_probs=logprobs, entropy=flat, mean_logits=flat, is_top1=flat.bool())
    return lambda **_: output


def _trl_dpo(logprobs: Tensor, reference: Tensor, lengths: Tensor, **fields: Any) -> Tensor:
    from trl import DPOTrainer  # noqa: PLC0415

    mask = _completion_mask(lengths)
    chosen, rejected = reference.chunk(2)
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss: Tensor = DPOTrainer._compute_loss(_trainer(**fields), _model(logprobs), inputs, False)
    return loss


def _sides(logprobs: Tensor, reference: Tensor, lengths: Tensor, baseline: float = 0.0) -> list[Responses]:
    parts = zip(logprobs.sum(1).chunk(2), reference.chunk(2), lengths.chunk(2), strict=True)
    return [Responses(*part, torch.full_like(part[0], baseline)) for part in parts]


@pytest.mark.parametrize("loss", ["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "apo_zero"])
def test_loss_and_gradient_are_those_of_trls_dpo_trainer(loss: str) -> None:
    reference = _token_logprobs(1, LENGTHS).sum(1)
    theirs = _token_logprobs(0, LENGTHS).requires_grad_()
    expected = _trl_dpo(theirs, reference, LENGTHS, loss_types=[loss])
    expected.backward()
    ours = theirs.detach().clone().requires_grad_()
    given = {"beta": BETA, "label_smoothing": SMOOTHING}
    found = LOSSES[loss](*_sides(ours, reference, LENGTHS), **{k: given[k] for k in PREFERENCE_LOSSES[loss]})
    found.losses.mean().backward()
    assert found.losses.mean().item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-5)


def test_conservative_is_trls_cpo_loss_on_log_ratios() -> None:
    # TRL dropped label smoothing from DPO's sigmoid loss in 1.0; in CPO, which has no reference, it lives on.
    from trl.experimental.cpo import CPOTrainer  # noqa: PLC0415

    reference = _token_logprobs(1, LENGTHS).sum(1)
    chosen, rejected = _sides(_token_logprobs(0, LENGTHS), reference, LENGTHS)
    trainer = SimpleNamespace(
        alpha=0.0, beta=BETA, label_smoothing=SMOOTHING, loss_type="sigmoid", accelerator=Accelerator()
    )
    expected = CPOTrainer.cpo_loss(trainer, chosen.ratios, rejected.ratios)
    found = LOSSES["conservative"](chosen, rejected, beta=BETA, label_smoothing=SMOOTHING)
    torch.testing.assert_close(found.losses, expected[0])
    torch.testing.assert_close(found.chosen_rewards, expected[1])


def test_simpo_is_trls_in_cpo() -> None:
    from trl.experimental.cpo import CPOTrainer  # noqa: PLC0415

    chosen, rejected = _sides(_token_logprobs(0, LENGTHS), torch.zeros(8), LENGTHS)
    trainer = SimpleNamespace(
        alpha=0.0,
        beta=2.0,
        label_smoothing=0.0,
        loss_type="simpo",
        simpo_gamma=0.8,
        accelerator=Accelerator(),
    )
    means = [side.logprobs / side.lengths for side in (chosen, rejected)]
    expected = CPOTrainer.cpo_loss(trainer, *means)
    found = LOSSES["simpo"](chosen, rejected, beta=2.0, gamma_beta_ratio=0.4)
    for mine, theirs in zip((found.losses, *found[2:]), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_orpo_is_trls_odds_ratio_with_the_likelihood_of_the_response() -> None:
    from trl.experimental.orpo import ORPOTrainer  # noqa: PLC0415

    chosen, rejected = _sides(_token_logprobs(0, LENGTHS), torch.zeros(8), LENGTHS)
    trainer = SimpleNamespace(beta=BETA, accelerator=Accelerator())
    means = [side.logprobs / side.lengths for side in (chosen, rejected)]
    ratio, *rewards, _, _ = ORPOTrainer.odds_ratio_loss(trainer, *means)
    found = LOSSES["orpo"](chosen, rejected, beta=BETA)
    # The trainer subtracts it from a likelihood that takes in the prompt's tokens too; the paper's is of the response.
    torch.testing.assert_close(found.losses, -means[0] - ratio)
    for mine, theirs in zip(found[2:], rewards, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("equal", [True, False])
def test_added_sft_term_is_trls_where_lengths_are_equal(equal: bool) -> None:
    # TRL takes the mean over all tokens of a batch, so that there a row's weight hangs on the rows beside it.
    lengths = torch.full((8,), 5) if equal else LENGTHS
    logprobs, reference = _token_logprobs(0, lengths), _token_logprobs(1, lengths).sum(1)
    both = {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}
    expected = _trl_dpo(logprobs, reference, lengths, **both).item()
    chosen, rejected = _sides(logprobs, reference, lengths)
    losses = LOSSES["sigmoid"](chosen, rejected, beta=BETA).losses
    found = (losses + 0.5 * nll(chosen, losses)).mean().item()
    assert (found == pytest.approx(expected, abs=1e-6)) == equal


def _trl_kto(
    logprobs: Tensor,
    reference: Tensor,
    labels: Tensor,
    other: Tensor,
    other_ref: Tensor,
    rows: slice = slice(None),
) -> Tensor:
    from trl import KTOTrainer  # noqa: PLC0415

    trainer = _trainer(loss_type="kto", calculate_KL=True, desirable_weight=1.5, undesirable_weight=0.5)
    trainer._compute_kl_logps = lambda *_: other[rows]
    mask = _completion_mask(LENGTHS)[rows]
    batch = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": labels[rows],
        "ref_logps": reference[rows],
        "ref_KL_logps": other_ref[rows],
    }
    loss: Tensor = KTOTrainer._compute_loss(trainer, _model(logprobs[rows]), batch, False)
    return loss


@pytest.mark.parametrize("shift", [0.6, -5.0])
def test_kto_is_trls(shift: float) -> None:
    labels = torch.tensor([True, False, False, True, True, False, True, True])
    reference = _token_logprobs(1, LENGTHS).sum(1)
    other = _token_logprobs(2, LENGTHS).sum(1)
    other_ref = other - torch.linspace(-1, 1, 8) - shift
    theirs = _token_logprobs(0, LENGTHS).requires_grad_()
    expected = _trl_kto(theirs, reference, labels, other, other_ref)
    expected.backward()

    baseline = kl_baseline(other, other_ref)
    assert baseline == pytest.approx(max(shift, 0.0), abs=1e-6)
    ours = theirs.detach().clone().requires_grad_()
    sides = [
        Responses(ours.sum(1)[side], reference[side], LENGTHS[side], torch.full((int(side.sum()),), baseline))
        for side in (labels, ~labels)
    ]
    found = LOSSES["kto"](*sides, beta=BETA, desirable_weight=1.5, undesirable_weight=0.5)
    found.losses.mean().backward()
    assert found.losses.mean().item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-7, rtol=1e-5)


def test_trls_kto_changes_with_the_micro_batch() -> None:
    # Its baseline is that of one forward; ours is that of the step, see tests/stages/test_dpo_stage.py.
    labels = torch.tensor([True, False] * 4)
    reference, other = _token_logprobs(1, LENGTHS).sum(1), _token_logprobs(2, LENGTHS).sum(1)
    given = (_token_logprobs(0, LENGTHS), reference, labels, other, other - torch.linspace(-3, 6, 8))
    halves = [_trl_kto(*given, rows=part) for part in (slice(0, 4), slice(4, 8))]
    assert abs(float(torch.stack(halves).mean() - _trl_kto(*given))) > 1e-2
