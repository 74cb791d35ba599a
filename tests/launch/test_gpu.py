"""What needs a GPU: that its commands compose is tested anywhere, that they run where there is one."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from alignpipe.compose.composition import compose
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.models.saving import save_model
from benchmarks.gpu import CASES, main


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_command_of_every_case_composes(
    case: object, make_llama: Callable[..., PreTrainedModel], tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert isinstance(case, type(CASES[0]))
    for name in ("base", "reward"):
        save_model(make_llama(), tokenizer, tmp_path / name)
    config = compose([word.format(folder=tmp_path) for word in case.words]).config
    assert config.launch.device == "cuda" and config.launch.precision == "bf16"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_toy_pipeline_runs_on_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy pipeline"]) == 0
    assert "exit" not in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 5
    assert "no CUDA device here" in capsys.readouterr().err
