"""The average of weights in closed form, under adapters too."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel

from alignpipe.compose.composition import compose
from alignpipe.models.adapters import Adapters, add_adapter, role_on
from alignpipe.training.ema import WeightAverage


def test_average_is_the_geometric_sum_of_all_weights() -> None:
    model, decay = nn.Linear(2, 1, bias=False, dtype=torch.float64), 0.7
    history = [torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[-1.0, 5.0]])]
    with torch.no_grad():
        model.weight.copy_(history[0])
        average = WeightAverage(model, decay)
        for weights in history[1:]:
            model.weight.copy_(weights)
            average.update(model)
    average.copy_to(model)
    expected = decay**2 * history[0] + (1 - decay) * (decay * history[1] + history[2])
    torch.testing.assert_close(model.weight.detach(), expected.double())


def test_average_does_not_share_its_tensors_with_the_model() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.5)
    before = average.averages[0].clone()
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(average.averages[0], before)


def test_average_of_an_adapter_holds_no_base(make_llama: Callable[..., PreTrainedModel]) -> None:
    base = make_llama().requires_grad_(False)
    config = compose(["adapter=lora", "adapter.rank=2"]).config.adapter
    role = add_adapter(role_on(base), Adapters(config, 0), None)
    average = WeightAverage(role, 0.5)
    assert {tuple(p.shape) for p in average.averages} == {
        tuple(p.shape) for p in role.parameters() if p.requires_grad
    }
    assert sum(p.numel() for p in average.averages) < 0.2 * sum(p.numel() for p in base.parameters())
