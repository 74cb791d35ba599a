"""Configurations, files and tokenizers for the tests of data."""

import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from alignpipe.config import (
    BiasConfig,
    ColumnsConfig,
    DataConfig,
    GuidelineConfig,
    LabelersConfig,
    SharesConfig,
    WorldConfig,
)

REPOSITORY = Path(__file__).parents[2]


def make_config(**changes: Any) -> DataConfig:
    named: dict[str, str | None] = {spec.name: None for spec in fields(ColumnsConfig)}
    values: dict[str, Any] = {
        "path": "",
        "format": "auto",
        "columns": ColumnsConfig(**{**named, **changes.pop("columns", {})}),
        "split": "train",
        "revision": None,
        "max_rows": None,
        "max_bad": 0.01,
        "on_overflow": "drop",
        "mixture": {},
        "mixture_stopping": "first_exhausted",
        "shares": SharesConfig(sft=0.4, preference=0.25, rl=0.2, eval=0.15),
        "labelers": LabelersConfig(
            num_labelers=2,
            noise=0.05,
            tie_margin=0.02,
            guideline=GuidelineConfig(helpful=0.6, truthful=0.4, harmless=1.0),
            bias=BiasConfig(length=0.0, flattery=0.0, confidence=0.0, subjectivity=0.0),
        ),
        "world": WorldConfig(seed=0, num_prompts=200, num_demonstrations=1, quality=0.5, mix={}),
    }
    return DataConfig(**{**values, **changes})


@pytest.fixture
def config() -> Callable[..., DataConfig]:
    return make_config


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """Writes text, bytes, or rows as JSON lines."""

    def write_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


@pytest.fixture
def shared() -> Path:
    """The folder of real data."""
    folder = (REPOSITORY / os.environ.get("ALIGNPIPE_TEST_DATA", "../shared")).resolve()
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set ALIGNPIPE_TEST_DATA")
    return folder


def train_backend(*special: str, adds_bos: bool = False) -> Backend:
    """A small byte-level tokenizer; the first special token is put before texts if `adds_bos`."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["the sky is blue:! and the sea is blue:!"] * 20, trainer)
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{special[0]} $A", special_tokens=[(special[0], backend.token_to_id(special[0]))]
        )
    return backend


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tokenizer as a model folder holds it."""

    def write_folder(
        *special: str, adds_bos: bool = False, template: str | None = None, **settings: Any
    ) -> Path:
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        train_backend(*special, adds_bos=adds_bos).save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        if template is not None:
            (folder / "chat_template.jinja").write_bytes(template.encode())
        return folder

    return write_folder
