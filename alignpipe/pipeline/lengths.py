"""Lengths that a model can hold: what the configuration asks for, brought within the model's positions.

A stage keeps its own lengths unless the model has fewer positions; then prompt and response share what there is.
"""

import json
from dataclasses import replace

from alignpipe.config import TINY, Config, EvalConfig, SamplingConfig, StageConfig, TrainingConfig
from alignpipe.errors import CheckpointError
from alignpipe.pipeline.hub import model_folder


def fit_lengths(config: Config) -> tuple[Config, list[str]]:
    """Lower every length that the base model's positions cannot hold.

    Returns:
        The configuration, and a sentence if anything was lowered.

    Raises:
        CheckpointError: the model's config.json cannot be read.
    """
    positions = _positions(config)
    if positions is None:
        return config, []
    stages = {name: _fitted(stage, positions) for name, stage in config.stages.items()}
    stage = None if config.stage is None else _fitted(config.stage, positions)
    if stages == config.stages and stage == config.stage:
        return config, []
    note = (
        f"the model has {positions} positions; longer max_length, prompts and responses were lowered to fit"
    )
    return replace(config, stages=stages, stage=stage), [note]


def _fitted(stage: StageConfig, positions: int) -> StageConfig:
    if isinstance(stage, TrainingConfig | EvalConfig) and stage.max_length > positions:
        stage = replace(stage, max_length=positions)
    if isinstance(stage, SamplingConfig) and stage.max_prompt_length + stage.max_response_length > positions:
        response = min(stage.max_response_length, positions // 2)
        prompt = min(stage.max_prompt_length, positions - response)
        stage = replace(stage, max_prompt_length=prompt, max_response_length=response)
    return stage


def _positions(config: Config) -> int | None:
    """Positions of the base model; None where its configuration names no limit."""
    if config.model.path == TINY:
        return None
    path = model_folder(config.model.path, config.model.revision) / "config.json"
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        found = raw.get("max_position_embeddings") or raw.get("n_positions")
        return int(found) if found else None
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read as a model configuration ({error})") from error
