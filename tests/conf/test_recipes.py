"""Every recipe composes, says where each of its numbers is from, and is planned on a shape of its model's size."""

import io
import json
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from alignpipe.compose import compose
from alignpipe.compose.composition import built_in_folder
from alignpipe.config import Config
from alignpipe.pipeline.plan import make_plan
from alignpipe.pipeline.plan_table import print_plan

ROOT = Path(__file__).parents[2]
# Recipe -> shape that stands for its model, and its stages.
RECIPES = {
    "instructgpt": ("llama-2-7b", ["sft", "rm", "sft_2", "ppo", "eval"]),
    "llama2_7b": ("llama-2-7b", ["sft", "rm", "rs", "ppo", "eval"]),
    "zephyr_7b": ("mistral-7b", ["sft", "dpo", "eval"]),
    "tulu3_8b_dpo": ("llama-3.1-8b", ["dpo"]),
    "smol_135m": ("smollm2-135m", ["sft", "dpo", "eval"]),
}
# Published numbers: experiment, key, value; their sources stand beside them in conf/experiment.
PUBLISHED = [
    ("instructgpt", "stages.sft_2.learning_rate", 9.65e-6),
    ("instructgpt", "stages.sft_2.epochs", 16),
    ("instructgpt", "stages.sft_2.select_epoch", "reward"),
    ("instructgpt", "stages.rm.batch_size", 64),
    ("instructgpt", "stages.ppo.kl_coef", 0.02),
    ("instructgpt", "stages.ppo.ema_decay", 0.992),
    ("instructgpt", "stages.ppo.ptx_coef", 27.8),
    ("llama2_7b", "stages.sft.batch_size", 64),
    ("llama2_7b", "stages.rm.learning_rate", 1e-5),
    ("llama2_7b", "stages.ppo.adam_epsilon", 1e-5),
    ("llama2_7b", "stages.ppo.kl_coef", 0.01),
    ("zephyr_7b", "stages.dpo.beta", 0.01),
    ("zephyr_7b", "stages.dpo.learning_rate", 5e-7),
    ("tulu3_8b_dpo", "stage.loss", "sigmoid_norm"),
    ("tulu3_8b_dpo", "stage.beta", 5.0),
    ("smol_135m", "stages.sft.learning_rate", 1e-3),
    ("smol_135m", "stages.dpo.beta", 0.5),
]


@pytest.fixture
def local_data(tmp_path: Path) -> list[str]:
    """Words that put small files in the place of the recipe's data sets."""
    sft, pairs = tmp_path / "sft.jsonl", tmp_path / "pairs.jsonl"
    asked = [f"Name {number} trees." for number in range(100)]
    sft.write_text("".join(json.dumps({"prompt": text, "completion": "Oak."}) + "\n" for text in asked))
    rows = [{"prompt": text, "chosen": "Oak, elm.", "rejected": "No."} for text in asked]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(sft), str(pairs)]


def _words(recipe: str, local_data: list[str]) -> list[str]:
    sft, pairs = local_data
    shape, order = RECIPES[recipe]
    words = [f"experiment={recipe}", f"model.path={ROOT}/docs/shapes/{shape}"]
    if order == ["dpo"]:
        return [*words, f"data.path={pairs}"]
    return [
        *words,
        f"data.path={sft}",
        *(f"stages.{name}.data.path={pairs}" for name in order if name in ("rm", "dpo")),
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_planned_with_its_stages_and_memory(
    recipe: str, local_data: list[str], tmp_path: Path
) -> None:
    config = compose([*_words(recipe, local_data), f"output_dir={tmp_path}/outputs"]).config
    plan = make_plan(config, bare=True)
    assert [row.name for row in plan.rows] == RECIPES[recipe][1]
    trained = [row.estimate for row in plan.rows if row.kind != "eval"]
    assert all(estimate is not None and estimate.memory.total > 1e9 for estimate in trained)
    printed = io.StringIO()
    print_plan(plan, Console(file=printed, width=100, highlight=False))
    assert "no tokenizer.json" in printed.getvalue()


@cache
def _config(recipe: str) -> Config:
    return compose([f"experiment={recipe}"]).config


@pytest.mark.parametrize(("recipe", "key", "value"), PUBLISHED)
def test_recipe_has_the_published_number(recipe: str, key: str, value: object) -> None:
    found: object = _config(recipe)
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_number_of_a_recipe_has_its_source_above_it(recipe: str) -> None:
    lines = (built_in_folder() / "experiment" / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    sources = ("appendix", "section", "handbook", "docs/tulu3.md", "arxiv", "paper")
    for above, line in pairwise(lines):
        value = line.partition(": ")[2].strip()
        if value.replace(".", "").replace("e-", "").isdigit():
            assert above.lstrip().startswith("#") and any(word in above.lower() for word in sources), line


def test_recipes_are_all_here() -> None:
    ours = {
        "reward_hacking",
        "reward_hacking_monitored",
        "reward_hacking_judged",
        "rloo",
        "grpo",
        "reinforce_pp",
    }
    found = {path.stem for path in (built_in_folder() / "experiment").glob("*.yaml")}
    assert found - ours == set(RECIPES)
