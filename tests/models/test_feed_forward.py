"""Feed-forwards that keep gate and up alone give what transformers' own give, and keep less."""

import gc
from collections.abc import Callable
from contextlib import nullcontext
from weakref import ref

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignpipe.models.feed_forward import _KeepsGateAndUp, keep_gate_and_up
from tests.models.test_attention import ARCHITECTURES, build

IDS = torch.arange(3, 67).view(2, 32)
GATED = {"llama", "mistral", "qwen2", "qwen3", "olmo2"}
Make = Callable[..., PreTrainedModel]


def _learn(model: PreTrainedModel, *, bf16: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a loss on them."""
    with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
        logits: Tensor = model(input_ids=IDS, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()  # type: ignore[no-untyped-call]
    return logits.detach(), {
        name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None
    }


def _count(model: PreTrainedModel) -> int:
    return sum(isinstance(module, _KeepsGateAndUp) for module in model.modules())


def _kept(model: PreTrainedModel) -> int:
    """Numbers that a forward keeps, each storage once."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=IDS, use_cache=False)
    kept = sum(tensor.untyped_storage().nbytes() for at, tensor in found.items() if at not in weights)
    del output
    return kept // 4


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_outputs_and_gradients_are_the_same_to_the_bit(kind: str) -> None:
    plain, ours = (build(kind, "sdpa", **ARCHITECTURES[kind]) for _ in range(2))
    assert keep_gate_and_up(ours) is ours
    assert _count(ours) == (2 if kind in GATED else 0)
    (expected, gradients), (found, ours_gradients) = _learn(plain), _learn(ours)
    assert torch.equal(found, expected)
    assert gradients.keys() == ours_gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(ours_gradients[name], gradient), name


def test_gradient_is_that_of_differences() -> None:
    model = keep_gate_and_up(build("llama", "eager", **ARCHITECTURES["llama"]).double())
    block = model.model.layers[0].mlp
    states = torch.randn(1, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(lambda x, _: block(x), (states.requires_grad_(), block.down_proj.weight))
    assert torch.autograd.gradcheck(
        lambda w: torch.func.functional_call(block, {"gate_proj.weight": w}, (states,)),
        block.gate_proj.weight,
    )


def test_two_inner_tensors_less_are_kept_a_block(make_llama: Make) -> None:
    plain, ours = make_llama().train(), keep_gate_and_up(make_llama()).train()
    config = ours.config
    less = 2 * IDS.numel() * config.intermediate_size * config.num_hidden_layers
    assert _kept(plain) - _kept(ours) == less > 0


def test_nothing_is_kept_without_gradients(make_llama: Make) -> None:
    model = keep_gate_and_up(make_llama())
    with torch.no_grad():
        assert _kept(model) == 0


def test_autocast_gives_what_it_gives_without(make_llama: Make) -> None:
    (expected, gradients), (found, ours) = (
        _learn(model.train(), bf16=True) for model in (make_llama(), keep_gate_and_up(make_llama()))
    )
    assert torch.equal(found, expected)
    for name, gradient in gradients.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - gradient).norm() <= 1e-2 * gradient.norm(), name


@pytest.mark.parametrize(("targets", "kept_less"), [(["q_proj", "gate_proj"], 2), (["down_proj"], 0)])
def test_adapters_learn_the_same(targets: list[str], kept_less: int, make_llama: Make) -> None:
    peft = pytest.importorskip("peft")
    found = []
    for change in (lambda model: model, keep_gate_and_up):
        torch.manual_seed(0)
        settings = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        # The adapter comes in between afterwards.
        model = peft.get_peft_model(change(make_llama()), settings).train()
        found.append((_learn(model), _kept(model)))
    ((expected, gradients), before), ((logits, ours), after) = found
    torch.testing.assert_close(logits, expected, atol=1e-6, rtol=1e-6)
    assert gradients.keys() == ours.keys() and all("lora" in name for name in ours)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-6, rtol=1e-5, msg=name)
    config = make_llama().config
    # The matrix behind is frozen and keeps no product.
    assert (
        before - after == kept_less // 2 * IDS.numel() * config.intermediate_size * config.num_hidden_layers
    )


def test_a_model_is_gone_with_its_last_name(make_llama: Make) -> None:
    model = keep_gate_and_up(make_llama())
    block = ref(model.model.layers[0].mlp)
    gc.disable()
    try:
        del model
        assert block() is None
    finally:
        gc.enable()


def test_a_second_time_changes_nothing(make_llama: Make) -> None:
    model = keep_gate_and_up(make_llama())
    before = [type(module) for module in model.modules()]
    assert [type(module) for module in keep_gate_and_up(model).modules()] == before


def test_blocks_computed_again_learn_the_same(make_llama: Make) -> None:
    found = []
    for change in (lambda model: model, keep_gate_and_up):
        model = change(make_llama()).train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(_learn(model))
    for name, gradient in found[0][1].items():
        assert torch.equal(found[1][1][name], gradient), name


def test_a_feed_forward_that_does_more_stays_as_it_is(make_llama: Make) -> None:
    model = make_llama()
    block = type(model.model.layers[0].mlp)

    class Louder(block):  # type: ignore[misc, valid-type]
        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = 2 * super().forward(x)
            return found

    model.model.layers[0].mlp.__class__ = Louder
    keep_gate_and_up(model)
    assert _count(model) == model.config.num_hidden_layers - 1
