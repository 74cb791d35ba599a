"""Weights of foreign folders are looked for before the first stage trains."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from alignpipe.errors import CheckpointError
from alignpipe.pipeline.weights import check_weights


def test_whole_shards_pass_and_a_missing_one_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    check_weights(tmp_path)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: missing"):
        check_weights(tmp_path)


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        check_weights(tmp_path)
