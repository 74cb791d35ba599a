"""What a context does to a model before a stage gets it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from transformers import PreTrainedModel

from alignpipe.compose.composition import compose
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.task import ModelInput
from alignpipe.training import context as module
from alignpipe.training.context import Context

MakeContext = Callable[..., Context]


@pytest.fixture
def changed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which changes of a model are made from now on; none is, so that none need work here."""
    found: list[str] = []

    def noted(name: str) -> Callable[..., PreTrainedModel]:
        def change(model: PreTrainedModel, *_: object) -> PreTrainedModel:
            found.append(name)
            return model

        return change

    for name in ("keep_gate_and_up", "compile_training", "shard"):
        monkeypatch.setattr(module, name, noted(name))
    return found


@pytest.mark.parametrize(
    ("settings", "launch", "expected"),
    [
        ({}, {}, ["keep_gate_and_up"]),
        ({}, {"strategy": "fsdp2"}, ["keep_gate_and_up", "shard"]),
        # The compiler decides what it keeps.
        ({"compile": True}, {}, ["compile_training"]),
    ],
)
def test_a_model_keeps_gate_and_up_unless_it_is_compiled(
    settings: dict[str, bool],
    launch: dict[str, str],
    expected: list[str],
    make_context: MakeContext,
    tokenizer: Tokenizer,
    changed: list[str],
) -> None:
    context = make_context(compose(["stage=sft"]).config.stage)
    models = {"policy": ModelInput("base", "tiny")}
    task = replace(context.task, models=models, launch=replace(context.task.launch, **launch), **settings)
    replace(context, task=task).load_policy("policy", tokenizer)
    assert changed == expected
