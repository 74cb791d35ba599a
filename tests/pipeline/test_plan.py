"""A plan tells what a run then does, warns of what is odd, and leaves nothing behind."""

import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import MachineError
from alignpipe.models.saving import save_model
from alignpipe.pipeline.lengths import fit_lengths
from alignpipe.pipeline.plan import make_plan
from tests.project import Project

Usage = namedtuple("Usage", ["total", "used", "free"])


def _metrics(project: Project, kind: str) -> list[dict[str, float]]:
    folder = next((project.outputs / "stages").glob(f"{kind}-*"))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_planned_rows_and_steps_are_those_of_the_run(finished: Project, project: Project) -> None:
    plan = {row.name: row for row in make_plan(project.compose().config).rows}
    done = {row.name: row for row in make_plan(finished.compose().config).rows}
    manifests = make_plan(finished.compose().config).reused
    assert [row.state for row in plan.values()] == ["run"] * 6
    assert [row.state for row in done.values()] == ["reuse"] * 6
    assert {row.key for row in plan.values()} == {row.key for row in done.values()}
    assert plan["sft"].rows == manifests["sft"].metrics["rows"]
    assert plan["collect"].rows == manifests["collect"].metrics["prompts"]
    for name in ("sft", "ppo"):
        assert plan[name].steps == max(row["step"] for row in _metrics(finished, name))
    assert plan["eval"].rows == 16
    assert plan["sft"].batch == "16 = 16 x 1"
    # 3 epochs over batches of 16, the last one begun counts.
    rows = plan["sft"].rows or 0
    assert plan["sft"].steps == -(-3 * rows // 16)
    # 2 rollouts x 16 responses in batches of 8, as often as ppo_epochs says.
    epochs = vars(project.compose().config.stages["ppo"])["ppo_epochs"]
    assert plan["ppo"].steps == 2 * 16 * epochs // 8


def test_plan_leaves_nothing_but_the_hashes_of_files(project: Project, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"prompt": f"Question {n}?", "completion": "Yes."}) for n in range(40)]
    rows.write_text("\n".join(lines), encoding="utf-8")
    make_plan(project.compose("stage=sft", f"data='{rows}'").config)
    left = [path.relative_to(project.outputs) for path in project.outputs.rglob("*") if path.is_file()]
    assert left == [Path("work/hashes.json")]


def test_rows_over_length_are_told(project: Project, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"prompt": f"Question {n}?", "completion": "yes " * (5000 if n % 2 else 1)})
        for n in range(40)
    ]
    rows.write_text("\n".join(lines), encoding="utf-8")
    plan = make_plan(project.compose("stage=sft", f"data='{rows}'").config)
    (warning,) = [line for line in plan.warnings if "of its rows are over" in line]
    share = float(warning.split("about ")[1].split("%")[0])
    assert 20 < share < 80
    assert "are dropped" in warning and "data.on_overflow" in warning
    dropping = {row.name: row.rows for row in plan.rows}["sft"]
    plan = make_plan(project.compose("stage=sft", f"data='{rows}'", "data.on_overflow=cut").config)
    assert any("are cut" in line for line in plan.warnings)
    cutting = {row.name: row.rows for row in plan.rows}["sft"]
    assert 0.2 < dropping / cutting < 0.8, "rows that are cut are trained on"


def test_dpo_without_an_sft_behind_it_is_warned_of(project: Project, finished: Project) -> None:
    alone = make_plan(project.compose("stage=dpo").config)
    assert any("no sft stands behind its policy" in line for line in alone.warnings)
    tuned = make_plan(finished.compose("stage=dpo", "stage.policy=latest/sft").config)
    assert not any("no sft" in line for line in tuned.warnings)


def test_lengths_are_brought_within_the_models_positions(
    make_llama: Callable[..., PreTrainedModel], tokenizer: Tokenizer, project: Project, tmp_path: Path
) -> None:
    save_model(make_llama(max_position_embeddings=64), tokenizer, tmp_path / "short")
    words = [f"model='{tmp_path}/short'", "model.max_response_length=60", "model.max_prompt_length=60"]
    config, notes = fit_lengths(project.compose(*words).config)
    assert len(notes) == 1 and "64 positions" in notes[0]
    for stage in config.stages.values():
        fields = vars(stage)
        assert fields.get("max_length", 0) <= 64
        assert fields.get("max_prompt_length", 0) + fields.get("max_response_length", 0) <= 64
    assert vars(config.stages["ppo"])["max_response_length"] == 32
    assert fit_lengths(config) == (config, [])


def test_disk_that_is_too_small_is_refused(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(MachineError, match=r"needs about .*, has 1 kB free; choose another output_dir"):
        make_plan(project.compose().config)
