"""Compiled blocks: the same numbers, the same names, no compilation at each step, and nothing in evaluation."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor.exc import InvalidCxxCompiler
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alignpipe.data.collate import TokenBatch, collate
from alignpipe.data.examples import Example
from alignpipe.errors import MachineError
from alignpipe.models import compiling
from alignpipe.models.attention import PACKED, allow_packing
from alignpipe.models.compiling import compile_training
from alignpipe.models.forward import batch_logprobs


@pytest.fixture(autouse=True)
def _attention_afterwards() -> Iterator[None]:
    before = {name: ALL_ATTENTION_FUNCTIONS[name] for name in PACKED.values()}
    torch.compiler.reset()
    counters.clear()
    yield
    for name, attend in before.items():
        AttentionInterface.register(name, attend)


def _batches() -> list[TokenBatch]:
    """Of unlike numbers of rows and tokens, short and long, with a shared prompt and without."""
    torch.manual_seed(0)

    def row(prompt: int, response: int) -> Example:
        ids = torch.randint(4, 600, (prompt + response,)).tolist()
        return Example(ids, [False] * prompt + [True] * response)

    shapes = [
        [(3, 4), (6, 1)],
        [(80, 30), (9, 9)],
        [(5, 9), (30, 7), (2, 2)],
        [(7, 5)],
        [(60, 50), (2, 3), (4, 4)],
    ]
    batches = [collate([row(*shape) for shape in shapes_of], 0) for shapes_of in shapes]
    prompt = torch.randint(4, 600, (12,)).tolist()
    pair = [Example.of(prompt, [5, 6, 7]), Example.of(prompt, [8, 9])]
    return [*batches, collate(pair, 0)]


@pytest.mark.slow
def test_training_is_the_same_and_compiles_no_more_after_two_batches(
    make_llama: Callable[..., PreTrainedModel],
) -> None:
    plain, model = allow_packing(make_llama()).train(), allow_packing(make_llama()).train()
    names = list(model.state_dict())
    assert compile_training(model) is model
    compiled = []
    for batch in _batches():
        losses = [batch_logprobs(one, batch) for one in (plain, model)]
        torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
        for loss in losses:
            loss.sum().backward()
        compiled.append(counters["stats"]["unique_graphs"])
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(
            ours.grad, theirs.grad, atol=1e-4, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert compiled[0] > 0
    # Short rows and long ones attend in two ways, so the second batch may compile what follows attention once more.
    assert compiled[1:] == [compiled[1]] * (len(compiled) - 1), "compiled again for other lengths"
    assert list(model.state_dict()) == names
    # No further graph: evaluation goes as it did.
    model.train(False)
    with torch.no_grad():
        batch_logprobs(model, _batches()[0])
    assert counters["stats"]["unique_graphs"] == compiled[-1]


def test_without_a_compiler_the_line_says_so(
    monkeypatch: pytest.MonkeyPatch, make_llama: Callable[..., PreTrainedModel]
) -> None:
    def none() -> str:
        raise InvalidCxxCompiler

    monkeypatch.setattr(compiling, "get_cpp_compiler", none)
    with pytest.raises(MachineError, match=r"no C\+\+ compiler, .* install g\+\+"):
        compile_training(make_llama())
