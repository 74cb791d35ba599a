"""Negative controls: a state that lacks a part is refused, and with that part begun anew the weights are others."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignpipe.artifact import Manifest, read_manifest, seal
from alignpipe.stages import sft
from alignpipe.training.checkpoint import OFFSETS
from tests.faults.commands import finish, start
from tests.faults.stopping import SFT, before_save, die, states, weights
from tests.faults.table import Faults
from tests.project import SMALL

WEIGHTS = "state-00000.safetensors"
# Everything that a state must hold decides something.
PPO = (
    *SMALL,
    "stage=ppo",
    "stage.policy=chain/sft",
    "stage.reference=chain/sft",
    "stage.reward_model=chain/rm",
    "stage.num_rollouts=3",
    "stage.save_steps=1",
    "stage.kl_controller=adaptive",
    "stage.kl_horizon=32",
    "stage.reward_scaling=running",
)
WORDS = {"sft": SFT, "ppo": PPO}
CHAIN = (*SMALL, "pipeline.order=[sft,collect,rm]", "run.name=chain")


@dataclass
class State:
    """What a saved state holds, to be changed and sealed again.

    Attributes:
        folder: of the project.
        tensors: by name.
        values: counters and coefficients.
        manifest: with the artifacts that it belongs to.
    """

    folder: Path
    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]
    manifest: Manifest

    def drop_tensors(self, prefix: str) -> None:
        """Leave out those whose names begin so."""
        self.tensors = {name: t for name, t in self.tensors.items() if not name.startswith(prefix)}


def _change(project: Path, do: Callable[[State], object]) -> None:
    """Change the one state of a project, so that its hashes are right again."""
    (folder,) = states(project).glob("step-*")
    manifest = read_manifest(folder)
    assert manifest is not None
    state = State(
        project, load_file(folder / WEIGHTS), json.loads((folder / "values.json").read_text()), manifest
    )
    do(state)
    offsets = json.dumps(dict.fromkeys(state.tensors, 0))
    save_file(state.tensors, folder / WEIGHTS, metadata={OFFSETS: offsets})
    (folder / "values.json").write_text(json.dumps(state.values))
    seal(folder, state.manifest)


def _reset_optimizer(state: State) -> None:
    state.drop_tensors("optimizer.")
    state.values["moments"] = {"model": 0}


def _reset_random_state(state: State) -> None:
    torch.manual_seed(0)
    state.tensors["rng.cpu"] = torch.get_rng_state()


def _reset_value_head(state: State) -> None:
    (rm,) = (state.folder / "outputs" / "stages").glob("rm-*")
    state.tensors["module.value.score.weight"] = load_file(rm / "model.safetensors")["score.weight"]


def _other_reference(state: State) -> None:
    """Train the reference further, as one does that goes on from a policy and takes it for the reference."""
    (sft,) = (state.folder / "outputs" / "stages").glob("sft-*")
    manifest = read_manifest(sft)
    assert manifest is not None
    tensors = load_file(sft / "model.safetensors")
    save_file({name: 1.1 * t for name, t in tensors.items()}, sft / "model.safetensors", {"format": "pt"})
    seal(sft, manifest)


def _reset_reference(state: State) -> None:
    _other_reference(state)
    (sft,) = (state.folder / "outputs" / "stages").glob("sft-*")
    known, now = state.manifest.parents, read_manifest(sft)
    assert now is not None
    for role in ("policy", "reference"):
        known[role] = type(known[role])(known[role].key, now.digest)


# Part -> stage, how it is left out, how it is begun anew in spite of that.
PARTS: dict[str, tuple[str, Callable[[State], object], Callable[[State], object]]] = {
    "optimizer": ("sft", lambda s: s.drop_tensors("optimizer."), _reset_optimizer),
    "kl coefficient": ("ppo", lambda s: s.values.pop("kl_coef"), lambda s: s.values.update(kl_coef=0.1)),
    "schedule": ("sft", lambda s: s.values.pop("step"), lambda s: s.values.update(step=0)),
    "random state": ("sft", lambda s: s.drop_tensors("rng."), _reset_random_state),
    "cursor": ("ppo", lambda s: s.values.pop("rollout"), lambda s: s.values.update(rollout=0)),
    "reference identity": ("ppo", lambda s: s.manifest.parents.pop("reference"), _reset_reference),
    "another reference": ("ppo", _other_reference, _reset_reference),
    "value head": ("ppo", lambda s: s.drop_tensors("module.value.score"), _reset_value_head),
    "moments": ("ppo", lambda s: s.values.pop("score_moments"), lambda s: s.values.update(score_moments=[])),
}
NAMED = {
    "optimizer": "0 moments of the optimizer of model",
    "kl coefficient": "no kl_coef",
    "schedule": "no step",
    "random state": "rng.cpu is not in it",
    "cursor": "no rollout",
    "reference identity": "with another reference",
    "another reference": "with another policy",
    "value head": "module.value.score.weight is not in it",
    "moments": "no score_moments",
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """A project with a finished chain, made when it is first asked for."""

    @cache
    def make() -> Path:
        folder = tmp_path_factory.mktemp("chain")
        assert finish(folder, "run", *CHAIN).process.exitcode == 0
        return folder

    return make


def _drawing(dies_at_save: int | None = None) -> None:
    """Let the stage draw from torch's generator, as dropout would: alignpipe itself draws by address alone."""
    loss = sft.sft_loss

    def noisy(*given: Any, **named: Any) -> torch.Tensor:
        losses = loss(*given, **named)
        return losses * (1 + 0.1 * torch.rand(())) if losses.requires_grad else losses

    sft.sft_loss = noisy
    if dies_at_save is not None:
        before_save(dies_at_save, die)


@pytest.fixture
def stopped(chain: Callable[[], Path], tmp_path: Path) -> Callable[[str], tuple[Path, str]]:
    """A project whose sft or ppo was killed after its first state, and the weights it must come to."""

    def make(kind: str) -> tuple[Path, str]:
        whole, killed = tmp_path / kind / "whole", tmp_path / kind / "killed"
        for folder in (whole, killed) if kind == "ppo" else ():
            shutil.copytree(chain(), folder, symlinks=True)
        assert start(whole, "run", *WORDS[kind], before=_drawing).wait() == 0
        start(killed, "run", *WORDS[kind], before=_drawing, given=(2,)).process.join(60)
        return killed, weights(whole)

    return make


def _resumed(
    killed: Path, folder: Path, kind: str, do: Callable[[State], object]
) -> tuple[int | None, str, str]:
    """Exit code, last line and weights of a run that goes on from a changed state."""
    shutil.copytree(killed, folder, symlinks=True)
    _change(folder, do)
    command = start(folder, "run", *WORDS[kind], before=_drawing)
    code = command.wait()
    return code, command.told.splitlines()[-1], weights(folder) if code == 0 else ""


def test_state_without_a_part_is_refused_and_with_it_begun_anew_the_weights_differ(
    tmp_path: Path,
    stopped: Callable[[str], tuple[Path, str]],
    count: Callable[[int, int], int],
    faults: Faults,
) -> None:
    tried = list(PARTS)[: count(1, len(PARTS))]
    kinds = {PARTS[part][0] for part in tried}
    projects = {kind: stopped(kind) for kind in kinds}
    for kind, (killed, whole) in projects.items():
        untouched = _resumed(killed, tmp_path / f"{kind}-untouched", kind, lambda state: None)
        assert untouched[0] == 0 and untouched[2] == whole, untouched
    refused = differ = 0
    for part in tried:
        kind, leave_out, reset = PARTS[part]
        killed, whole = projects[kind]
        code, line, _ = _resumed(killed, tmp_path / f"{part}-dropped", kind, leave_out)
        assert NAMED[part] in line, f"{part}: {line}"
        refused += code == 4
        code, line, found = _resumed(killed, tmp_path / f"{part}-reset", kind, reset)
        assert code == 0, f"{part}: {line}"
        assert found != whole, part
        differ += 1
    faults.tell("state without a part: refused, exit 4", refused, len(tried))
    faults.tell("state with a part begun anew: other weights", differ, len(tried))
