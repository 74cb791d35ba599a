"""A small project for tests: the real commands on a world and a model that take seconds."""

from copy import deepcopy
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from alignpipe.artifact import remove_tree
from alignpipe.compose.composition import Composed, compose
from alignpipe.pipeline.plan import make_plan
from alignpipe.pipeline.runner import run
from alignpipe.pipeline.status import run_status
from alignpipe.pipeline.store import TASK, Store
from alignpipe.pipeline.tasks import stage_task
from alignpipe.task import Task, write_task

# A chain that takes seconds: it proves how stages fit together, not that they learn.
SMALL = (
    "model.architecture.hidden_size=32",
    "model.architecture.intermediate_size=64",
    "model.architecture.num_layers=2",
    "model.max_response_length=12",
    "data.world.num_prompts=240",
    "data.world.num_demonstrations=1",
    "model.training.sft.batch_size=16",
    "model.training.sft.micro_batch_size=16",
    "model.training.sft.epochs=3",
    "model.training.rm.epochs=1",
    "model.training.rs.epochs=1",
    "model.training.dpo.max_steps=3",
    "model.training.ppo.num_rollouts=2",
    "model.training.ppo.rollout_size=16",
    "model.training.ppo.batch_size=8",
    "model.training.collect.num_samples=4",
    "model.training.rs.num_prompts=null",
    "model.training.rs.num_samples=3",
    "model.training.eval.num_prompts=16",
    "rollout.batch_size=256",
)

# ppo by itself, on what the finished chain left.
PPO_ALONE = (
    "stage=ppo",
    "stage.policy=latest/sft",
    "stage.reference=latest/sft",
    "stage.reward_model=latest/rm",
    "stage.log_steps=1",
)


@lru_cache(maxsize=64)
def _composed(words: tuple[str, ...], _folder: Path) -> Composed:
    """The configuration of a small run in the folder of any project; `_folder` is where paths are seen from."""
    return compose([*SMALL, *words])


class Project:
    """A working folder in which commands are run as a user types them, in this process."""

    def __init__(self, outputs: Path) -> None:
        self.outputs = outputs

    def compose(self, *words: str) -> Composed:
        """The configuration of a small run, composed once for all projects that say the same words."""
        composed = deepcopy(_composed(words, Path.cwd()))
        here = f"output_dir: {self.outputs}\n"
        yaml = composed.yaml.replace("output_dir: outputs\n", here)
        return replace(composed, config=replace(composed.config, output_dir=str(self.outputs)), yaml=yaml)

    def run(self, *words: str) -> Path:
        """Run to the end; the folder of the run."""
        composed = self.compose(*words)
        run(composed.config, list(words), composed.yaml)
        return self.outputs / "runs" / (self.outputs / "latest").read_text().strip()

    def prepare(self, stage: str, *words: str) -> Task:
        """Write the task of a stage whose parents are finished, and make its folders anew."""
        config = self.compose(*words).config
        plan, store = make_plan(config), Store(self.outputs)
        task = stage_task(plan.graph.nodes[stage], config, plan, store)
        if task.target.is_symlink():
            task.target.unlink()
        remove_tree(task.target)
        remove_tree(task.work)
        task.work.mkdir(parents=True)
        write_task(task, task.work / TASK)
        return task

    def states(self, name: str | None = None) -> dict[str, str]:
        """State of each stage of a run, the newest by default."""
        return {stage["name"]: stage["state"] for stage in run_status(self.outputs, name)["stages"]}
