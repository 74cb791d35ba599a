"""PPO-ptx: a second term in the same step, with rows of its own that nothing but the update decides."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
import torch
from torch.optim import SGD, AdamW
from transformers import PreTrainedModel

from alignpipe.compose.composition import compose
from alignpipe.config import PPOConfig
from alignpipe.data.collate import collate
from alignpipe.data.examples import Example
from alignpipe.losses.sft import sft_loss
from alignpipe.models.forward import batch_logprobs
from alignpipe.training.context import Context
from alignpipe.training.loop import StepOutput, Term, optimizer_step
from alignpipe.training.ptx import PtxLoss


def _config(**changes: Any) -> PPOConfig:
    words = [f"stage.{name}={value}" for name, value in changes.items()]
    stage = compose(["stage=ppo", "stage.reward_model=rm", "stage.max_grad_norm=1e9", *words]).config.stage
    assert isinstance(stage, PPOConfig)
    return stage


def _rows(count: int, seed: int) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        ids = torch.randint(5, 60, (4 + index % 5,), generator=generator).tolist()
        made.append(Example(ids, [False, False] + [True] * (len(ids) - 2)))
    return made


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_each_term_is_divided_by_its_own_items(
    make_context: Callable[..., Context], make_llama: Callable[..., PreTrainedModel], micro: int
) -> None:
    mine, other, weight, rate = _rows(8, 0), _rows(5, 1), 0.3, 0.1
    model, config = (
        make_llama(),
        _config(batch_size=micro * 8, rollout_size=micro * 8, micro_batch_size=micro),
    )

    def loss_fn(rows: Sequence[Example]) -> StepOutput:
        batch = collate(rows, 0)
        return StepOutput(sft_loss(batch_logprobs(model, batch), batch.loss_mask[:, 1:]))

    means = [loss_fn(rows).losses.sum() / sum(row.num_items for row in rows) for rows in (mine, other)]
    (means[0] + weight * means[1]).backward()
    expected = [p.detach() - rate * cast(torch.Tensor, p.grad) for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    plain = cast(AdamW, SGD(model.parameters(), lr=rate))
    more = [Term(other, loss_fn, weight, "ppo/ptx_loss")]
    figures = optimizer_step(model, plain, mine, loss_fn, config, make_context(config), more)
    for found, want in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), want, rtol=1e-5, atol=1e-6)
    assert figures["loss"][0] == pytest.approx(means[0].item(), abs=1e-5)
    assert figures["ppo/ptx_loss"] == (pytest.approx(means[1].item(), abs=1e-5), 1.0)


def test_rows_of_an_update_depend_on_its_number_alone(make_context: Callable[..., Context]) -> None:
    config = _config(ptx_coef=1.0, ptx_batch_size=4)
    rows = _rows(10, 2)
    ptx = PtxLoss(rows, cast(PreTrainedModel, None), config, make_context(config), 0)
    found = [ptx.terms(update)[0].rows for update in range(5)]
    assert found[3] == PtxLoss(rows, ptx.policy, config, ptx.context, 0).terms(3)[0].rows
    # Five updates of four rows are two epochs of ten.
    seen = [row for part in found for row in part]
    assert sorted(map(rows.index, seen[:10])) == sorted(map(rows.index, seen[10:])) == list(range(10))
    assert PtxLoss([], ptx.policy, config, ptx.context, 0).terms(0) == []
