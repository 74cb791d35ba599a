"""Liger's kernels: what is asked for, and where it is refused. No test runs them: they need a GPU."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from alignpipe.errors import MachineError
from alignpipe.models import kernels
from alignpipe.models.kernels import use_liger

CUDA = torch.device("cuda")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the function that transformers calls too is called with."""
    found: list[dict[str, Any]] = []
    fake: Any = ModuleType("liger_kernel.transformers.monkey_patch")
    fake.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
    fake._apply_liger_kernel_to_instance = lambda **settings: found.append(settings)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", ModuleType("liger_kernel.transformers"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", fake)
    monkeypatch.setattr(kernels, "is_liger_kernel_available", lambda: True)
    return found


def test_blocks_get_kernels_and_head_and_loss_do_not(
    calls: list[dict[str, Any]], make_llama: Callable[..., PreTrainedModel]
) -> None:
    model = make_llama()
    assert use_liger(model, CUDA) is model
    assert calls == [
        {
            "model": model,
            "rope": True,
            "rms_norm": True,
            "swiglu": True,
            "cross_entropy": False,
            "fused_linear_cross_entropy": False,
        }
    ]


def test_an_architecture_without_kernels_is_refused(
    calls: list[dict[str, Any]], make_gpt2: Callable[..., PreTrainedModel]
) -> None:
    with pytest.raises(MachineError, match="liger has no kernels for gpt2"):
        use_liger(make_gpt2(), CUDA)
    assert not calls


def test_another_device_is_refused(
    calls: list[dict[str, Any]], make_llama: Callable[..., PreTrainedModel]
) -> None:
    with pytest.raises(MachineError, match="liger runs on CUDA devices, this is cpu"):
        use_liger(make_llama(), torch.device("cpu"))
    assert not calls


def test_where_it_is_not_installed_the_line_says_how(
    monkeypatch: pytest.MonkeyPatch, make_llama: Callable[..., PreTrainedModel]
) -> None:
    monkeypatch.setattr(kernels, "is_liger_kernel_available", lambda: False)
    with pytest.raises(MachineError, match=r"pip install 'alignpipe\[liger\]'"):
        use_liger(make_llama(), CUDA)
