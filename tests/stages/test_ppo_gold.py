"""A known result of RL from feedback: whatever estimates the advantage, the policy passes SFT in gold score."""

import json
from pathlib import Path

import pytest

from alignpipe.compose.composition import compose
from alignpipe.pipeline.runner import run

METHODS = {
    "gae": ["pipeline=instructgpt_style"],
    "rloo": ["experiment=rloo"],
    "grpo": ["experiment=grpo"],
    "reinforce_pp": ["experiment=reinforce_pp"],
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store in which the first method makes sft, collect and rm for all of them."""
    return tmp_path_factory.mktemp("world") / "outputs"


@pytest.mark.slow  # a minute of training for each method, three for what stands before it
@pytest.mark.parametrize("method", METHODS)
def test_every_estimator_passes_sft_in_gold(outputs: Path, method: str) -> None:
    words = [*METHODS[method], "stages.eval.policies=[sft,ppo]", f"output_dir='{outputs}'"]
    composed = compose(words)
    run(composed.config, words, composed.yaml)
    folder = outputs / "runs" / (outputs / "latest").read_text().strip()
    policies = json.loads((folder / "scorecard.json").read_text())["policies"]
    sft, ppo = (policies[name]["gold"]["overall"] for name in ("sft", "ppo"))
    # Measured: 0.27 to 0.37 over two seeds.
    assert ppo > sft + 0.15
