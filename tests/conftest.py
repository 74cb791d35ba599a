"""Shared by all tests: the toy tokenizer, tiny real models with seeded weights, where real data lies."""

import os
import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import IO

import pytest
import torch
from omegaconf import OmegaConf, base
from omegaconf.dictconfig import DictConfig
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from alignpipe.config import ArchitectureConfig
from alignpipe.data.tokenizer import Tokenizer
from tests.group import Group
from tests.project import Project

DATA = Path(os.environ.get("ALIGNPIPE_TEST_DATA", Path(__file__).parents[1] / ".." / "shared"))
# Weights larger than those of a fresh model, so that a wrong mask or position shows in the numbers.
LOUD = 0.3


@pytest.fixture(scope="session", autouse=True)
def _read_once() -> Iterator[None]:
    """Parse every YAML text and every interpolation once.

    Tests compose a thousand times from the same files, and parsing them anew takes half of a composition.
    """
    load = OmegaConf.load
    loaded: dict[str, DictConfig] = {}

    def load_once(file: Path | IO[str]) -> DictConfig:
        text = file.read_text(encoding="utf-8") if isinstance(file, Path) else file.read()
        if text not in loaded:
            if not isinstance(file, Path):
                file.seek(0)
            loaded[text] = load(file)
        return deepcopy(loaded[text])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OmegaConf, "load", staticmethod(load_once))
        patch.setattr(base, "parse", cache(base.parse))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and models; a test that needs it skips where it is absent."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA}; set ALIGNPIPE_TEST_DATA")
    return DATA


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The embedded world's own tokenizer."""
    return Tokenizer.toy()


@pytest.fixture
def architecture() -> ArchitectureConfig:
    """A Llama small enough for a test."""
    return ArchitectureConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, seed=0)


@pytest.fixture
def make_llama(tokenizer: Tokenizer) -> Callable[..., PreTrainedModel]:
    """Builds tiny Llamas with seeded weights and the toy vocabulary; other fields can be given."""

    def make(seed: int = 0, **fields: object) -> PreTrainedModel:
        settings = {
            "vocab_size": tokenizer.vocab_size,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "initializer_range": LOUD,
            "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_id,
        }
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **fields})).eval()

    return make


@pytest.fixture
def make_gpt2(tokenizer: Tokenizer) -> Callable[..., PreTrainedModel]:
    """Builds tiny GPT-2s: learned positions, dropout in the configuration, another layout of weights."""

    def make(seed: int = 0, **fields: object) -> PreTrainedModel:
        settings = {
            "vocab_size": tokenizer.vocab_size,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 128,
            "initializer_range": LOUD,
            "pad_token_id": tokenizer.pad_id,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_id,
        }
        torch.manual_seed(seed)
        return GPT2LMHeadModel(GPT2Config(**{**settings, **fields})).eval()

    return make


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """An empty project."""
    return Project(tmp_path / "outputs")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project in which a small llama2_style chain is done; tests that write copy it first."""
    project = Project(tmp_path_factory.mktemp("finished") / "outputs")
    project.run()
    return project


@pytest.fixture(scope="session")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    """Two processes that wait for work."""
    pair = Group(tmp_path_factory.mktemp("group"))
    yield pair
    pair.close()


@pytest.fixture
def copied(finished: Project, tmp_path: Path) -> Project:
    """The finished project, to be changed at will."""
    shutil.copytree(finished.outputs, tmp_path / "outputs", symlinks=True)
    return Project(tmp_path / "outputs")
