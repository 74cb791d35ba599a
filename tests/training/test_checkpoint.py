"""States come back bit for bit, and a damaged one is never used."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from transformers import PreTrainedModel

from alignpipe.artifact import Parent
from alignpipe.errors import CheckpointError, MachineError
from alignpipe.training import checkpoint
from alignpipe.training.checkpoint import load_newest_state, save_state


def _trained(seed: int = 0, steps: int = 3) -> tuple[nn.Module, AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
    optimizer = AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def _save(states: Path, step: int, model: nn.Module, optimizer: AdamW) -> None:
    save_state(states, step, {"model": model}, {"model": optimizer}, {"step": step, "kl_coef": 0.25})


def test_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model, optimizer = _trained()
    _save(tmp_path, 3, model, optimizer)
    expected_draw = torch.rand(4)
    fresh, other = _trained(seed=1, steps=0)
    values = load_newest_state(tmp_path, {"model": fresh}, {"model": other})
    assert values == {"step": 3, "kl_coef": 0.25}
    assert torch.equal(torch.rand(4), expected_draw)
    for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    mine, theirs = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[i][name], theirs[i][name]) for i in mine for name in mine[i])


def test_tied_weights_come_back_tied(tmp_path: Path, make_llama: Callable[..., PreTrainedModel]) -> None:
    model, fresh = make_llama(seed=0), make_llama(seed=1)
    optimizer = AdamW(model.parameters())
    save_state(tmp_path, 1, {"model": model}, {"model": optimizer}, {"step": 1})
    load_newest_state(tmp_path, {"model": fresh}, {"model": AdamW(fresh.parameters())})
    assert torch.equal(fresh.lm_head.weight, model.model.embed_tokens.weight)
    assert fresh.lm_head.weight.data_ptr() == fresh.model.embed_tokens.weight.data_ptr()


def test_what_keeps_the_rest_from_being_the_same_to_the_bit_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, told = checkpoint.made_with(), list[str]()
    model, optimizer = _trained()
    with monkeypatch.context() as then:
        then.setattr(checkpoint, "made_with", lambda: now | {"torch": "2.0.0", "threads": "99"})
        _save(tmp_path, 3, model, optimizer)
    load_newest_state(tmp_path, {"model": model}, {"model": optimizer}, tell=told.append)
    (line,) = told
    assert line.startswith(
        f"torch 2.0.0 -> {now['torch']}, threads 99 -> {now['threads']} since step-000003: the rows stay"
    )
    _save(tmp_path, 4, model, optimizer)
    load_newest_state(tmp_path, {"model": model}, {"model": optimizer}, tell=told.append)
    assert told == [line]


def test_only_the_newest_two_are_kept(tmp_path: Path) -> None:
    model, optimizer = _trained()
    for step in (1, 2, 3, 10):
        _save(tmp_path, step, model, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000010"]


def test_no_state_is_no_error(tmp_path: Path) -> None:
    model, optimizer = _trained()
    assert load_newest_state(tmp_path / "absent", {"model": model}, {"model": optimizer}) is None


@pytest.mark.parametrize("trial", range(40))
def test_any_flipped_bit_is_found_and_the_state_before_is_used(tmp_path: Path, trial: int) -> None:
    model, optimizer = _trained()
    _save(tmp_path, 1, model, optimizer)
    _save(tmp_path, 2, model, optimizer)
    rng = random.Random(trial)
    victim = rng.choice(sorted(path for path in (tmp_path / "step-000002").iterdir()))
    content = bytearray(victim.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    victim.write_bytes(bytes(content))
    values = load_newest_state(tmp_path, {"model": model}, {"model": optimizer})
    assert values == {"step": 1, "kl_coef": 0.25}
    assert (tmp_path / "corrupt-step-000002").is_dir()
    _save(tmp_path, 2, model, optimizer)
    assert load_newest_state(tmp_path, {"model": model}, {"model": optimizer}) == {"step": 2, "kl_coef": 0.25}


@pytest.mark.parametrize("name", ["state-00000.safetensors", "values.json", "alignpipe.json"])
def test_half_written_state_is_passed_over(tmp_path: Path, name: str) -> None:
    model, optimizer = _trained()
    _save(tmp_path, 1, model, optimizer)
    _save(tmp_path, 2, model, optimizer)
    victim = tmp_path / "step-000002" / name
    victim.write_bytes(victim.read_bytes()[: victim.stat().st_size // 2])
    assert load_newest_state(tmp_path, {"model": model}, {"model": optimizer}) == {"step": 1, "kl_coef": 0.25}


def test_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model, optimizer = _trained()
    _save(tmp_path, 1, model, optimizer)
    other = nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 1))
    with pytest.raises(CheckpointError, match="does not fit the model"):
        load_newest_state(tmp_path, {"model": other}, {"model": AdamW(other.parameters())})


def test_no_state_that_is_whole_is_an_error_and_nothing_is_moved(tmp_path: Path) -> None:
    model, optimizer = _trained()
    for step in (1, 2):
        _save(tmp_path, step, model, optimizer)
        (tmp_path / f"step-00000{step}" / "values.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no state is whole, .*step-000002.*step-000001"):
        load_newest_state(tmp_path, {"model": model}, {"model": optimizer})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_step_of_more_digits_is_newer(tmp_path: Path) -> None:
    model, optimizer = _trained()
    for step in (999_999, 1_000_000):
        _save(tmp_path, step, model, optimizer)
    values = load_newest_state(tmp_path, {"model": model}, {"model": optimizer})
    assert values is not None and values["step"] == 1_000_000


def test_state_made_with_another_artifact_is_refused(tmp_path: Path) -> None:
    model, optimizer = _trained()
    before, after = {"reference": Parent("0123", "aa")}, {"reference": Parent("0123", "bb")}
    save_state(tmp_path, 1, {"model": model}, {"model": optimizer}, {"step": 1}, before)
    assert load_newest_state(tmp_path, {"model": model}, {"model": optimizer}, before) == {"step": 1}
    for other in (after, {}):
        with pytest.raises(CheckpointError, match="was made with another reference"):
            load_newest_state(tmp_path, {"model": model}, {"model": optimizer}, other)


def test_state_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    model, optimizer = _trained()
    _save(tmp_path, 1, model, optimizer)
    # A file stands where the folder of the new state has to go.
    (tmp_path / ".step-000002.tmp").write_text("in the way")
    with pytest.raises(MachineError, match="step-000002"):
        _save(tmp_path, 2, model, optimizer)
    assert load_newest_state(tmp_path, {"model": model}, {"model": optimizer}) == {"step": 1, "kl_coef": 0.25}


def test_state_holds_no_pickle(tmp_path: Path) -> None:
    model, optimizer = _trained()
    _save(tmp_path, 1, model, optimizer)
    folder = tmp_path / "step-000001"
    assert sorted(path.name for path in folder.iterdir()) == [
        "alignpipe.json",
        "state-00000.safetensors",
        "values.json",
    ]
    assert json.loads((folder / "values.json").read_text())["step"] == 1
