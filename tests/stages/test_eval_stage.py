"""Evaluation: common random numbers, the reference's own KL, what stands beside a policy, prompts nobody can judge."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alignpipe.artifact import MANIFEST
from alignpipe.config import EvalConfig
from alignpipe.data.encoding import encode_demonstrations
from alignpipe.data.shares import in_share
from alignpipe.data.sources import find_source, read_records
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import AlignpipeError, DataError
from alignpipe.pipeline.plan import make_plan
from tests.project import Project

NOTHING = {"overall": None, "helpful": None, "truthful": None, "harmless": None, "ci95": None}


def _scores(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "eval" / "scores.json").read_text())
    return found


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of prompts that the embedded world does not know."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"Why is {number} a number?"} for number in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_same_policy_twice_gets_the_same_figures(copied: Project) -> None:
    folder = copied.run(
        "stage=eval",
        "stage.policies=[latest/sft,latest/sft]",
        "stage.reference=latest/sft",
        "stage.reward_model=latest/rm",
    )
    scores = _scores(folder)
    first, second = scores["policies"]
    assert first == second
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)
    assert scores["gains"] == [{"before": 0, "after": 1, "gold": 0.0, "ci95": [0.0, 0.0]}]
    assert scores["num_prompts"] == 16


def test_other_policy_gets_other_figures(copied: Project) -> None:
    folder = copied.run(
        "stage=eval", "stage.policies=[base,latest/sft]", "stage.reference=latest/sft", "stage.num_prompts=8"
    )
    scores = _scores(folder)
    base, sft = scores["policies"]
    assert base["kl"] > 1
    assert sft["kl"] == pytest.approx(0.0, abs=1e-6)
    assert sft["reward"] is None
    gain = scores["gains"][0]
    assert gain["gold"] == pytest.approx(sft["gold"]["overall"] - base["gold"]["overall"])
    assert gain["ci95"][0] <= gain["gold"] <= gain["ci95"][1]


def test_prompts_of_ones_own_have_no_gold(copied: Project, prompts: Path) -> None:
    folder = copied.run(
        "stage=eval",
        "stage.policies=[latest/sft]",
        "stage.reference=latest/sft",
        "stage.reward_model=latest/rm",
        f"data='{prompts}'",
        "data.shares.eval=0.5",
        "data.shares.sft=0.5",
        "data.shares.preference=0",
        "data.shares.rl=0",
    )
    policy = _scores(folder)["policies"][0]
    assert policy["gold"] == NOTHING
    assert policy["prejudice"] is None
    assert policy["perplexity"] is None
    assert 0 < policy["distinct_2"] <= 1
    assert isinstance(policy["reward"], float)
    assert policy["kl"] == pytest.approx(0.0, abs=1e-6)
    assert _scores(folder)["gains"] == []
    scorecard = json.loads((folder / "scorecard.json").read_text())
    (named,) = scorecard["policies"].values()
    assert named["gold"] == NOTHING


def test_toy_judge_on_prompts_of_ones_own_is_refused(copied: Project, prompts: Path) -> None:
    with pytest.raises(AlignpipeError, match="judge"):
        copied.run("stage=eval", "stage.policies=[latest/sft]", "stage.judge=toy", f"data='{prompts}'")


def test_judge_none_leaves_gold_out_on_the_embedded_world(copied: Project) -> None:
    folder = copied.run("stage=eval", "stage.policies=[latest/sft]", "stage.judge=none")
    policy = _scores(folder)["policies"][0]
    assert policy["gold"] == NOTHING
    assert policy["prejudice"] is None
    assert policy["kl"] is None
    assert policy["reward"] is None
    assert policy["length"] > 0


# Without the gold judge there are no loaded questions to ask.
QUICK = ("stage=eval", "stage.judge=none")
SFT = ("stage=eval", "stage.reference=latest/sft", "stage.reward_model=latest/rm", "stage.num_prompts=12")


def _policies(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = _scores(folder)["policies"]
    return found


@pytest.fixture
def folder(copied: Project, tmp_path: Path) -> Path:
    """The fine-tuned policy as a plain Hugging Face folder, nothing of ours left in it."""
    (done,) = (copied.outputs / "runs").glob("*/rs")
    plain = tmp_path / "plain model"
    shutil.copytree(done.resolve(), plain)
    (plain / MANIFEST).unlink()
    return plain


def test_runs_and_folders_stand_beside_each_other_and_change_nothing_of_each_other(
    copied: Project, folder: Path
) -> None:
    against = "stage.win_rate_against=latest/sft"
    both = _policies(copied.run(*SFT, against, f"stage.policies=[latest/ppo,'{folder}',latest/rs]"))
    alone = _policies(
        copied.run(*SFT, against, f"stage.policies=['{folder}']", "stage.generation_batch_size=7")
    )
    # The same weights by two names, in company and alone, in batches of another size, in another place.
    for figures in (both[2], alone[0]):
        assert figures["gold"] == both[1]["gold"]
        assert figures["distinct_2"] == both[1]["distinct_2"]
        for name in ("reward", "kl", "perplexity", "kl_per_token", "refusal", "seq_rep_4"):
            assert figures[name] == pytest.approx(both[1][name], abs=1e-4), name
        assert figures["win_rate"] == both[1]["win_rate"]
        assert figures["prejudice"]["details"]["refusal"] == both[1]["prejudice"]["details"]["refusal"]
    assert both[0]["gold"] != both[1]["gold"]


def test_wins_of_two_policies_over_each_other_add_up_to_one(copied: Project) -> None:
    words = ("stage.policies=[latest/sft,latest/ppo]", "stage.num_samples=2")
    ppo = _policies(copied.run(*SFT, *words, "stage.win_rate_against=latest/sft"))[1]
    sft = _policies(copied.run(*SFT, *words, "stage.win_rate_against=latest/ppo"))[0]
    for rate in ("win_rate", "length_controlled_win_rate"):
        for judge in ("gold", "reward"):
            assert ppo[rate][judge] + sft[rate][judge] == pytest.approx(1.0), (rate, judge)
            low, high = ppo["ci95"][f"{rate}.{judge}"]
            assert 0 <= low <= ppo[rate][judge] <= high <= 1
    assert sft["win_rate"]["reward"] not in (0.5, ppo["win_rate"]["reward"])


def test_more_samples_begin_with_the_fewer(copied: Project) -> None:
    words = (*QUICK, "stage.policies=[latest/sft]", "stage.num_prompts=8", "stage.text_rows=0")
    one, three = (copied.run(*words, f"stage.num_samples={count}") for count in (1, 3))
    first, second = ((run / "eval" / "samples.jsonl").read_text() for run in (one, three))
    assert first == second
    lengths = [_policies(run)[0]["length"] for run in (one, three)]
    assert lengths[0] != lengths[1]
    assert _policies(three)[0]["perplexity"] is None
    # A mean of 24 whole numbers.
    assert lengths[1] * 24 == pytest.approx(round(lengths[1] * 24))


def test_perplexity_is_that_of_the_held_out_demonstrations(copied: Project) -> None:
    words = (*QUICK, "stage.policies=[latest/sft]", "stage.num_prompts=4", "stage.text_rows=10")
    found = _policies(copied.run(*words))[0]
    config = copied.compose(*words).config.stage
    assert isinstance(config, EvalConfig)
    records = read_records(find_source("toy", config.data), "demonstrations").records
    held_out = in_share(records, "eval", config.data.shares)[:10]
    model = AutoModelForCausalLM.from_pretrained(next((copied.outputs / "stages").glob("sft-*")))
    total, count = 0.0, 0
    for example in encode_demonstrations(held_out, Tokenizer.toy(), 128, "drop").examples:
        ids = torch.tensor([example.ids])
        labels = torch.where(torch.tensor([example.mask]), ids, -100)
        with torch.no_grad():
            total += model(input_ids=ids, labels=labels).loss.item() * sum(example.mask)
        count += sum(example.mask)
    assert found["perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-4)
    low, high = found["ci95"]["perplexity"]
    assert low < found["perplexity"] < high


def test_perplexity_on_ones_own_documents(copied: Project, tmp_path: Path) -> None:
    text = tmp_path / "held out.txt"
    text.write_text("\n\n".join(f"Document {number} is about the number {number}." for number in range(40)))
    words = (*QUICK, "stage.policies=[latest/sft,base]", "stage.num_prompts=4", "stage.text_rows=20")
    found = _policies(copied.run(*words, f"stage.text_data={text}"))
    documents = _policies(copied.run(*words, "stage.text_data.format=text"))
    # Trained on the world alone: it knows the world's documents better than others.
    assert documents[0]["perplexity"] < found[0]["perplexity"]
    assert documents[0]["perplexity"] < documents[1]["perplexity"]


def test_templates_of_ones_own_are_asked_about_made_up_groups(copied: Project, tmp_path: Path) -> None:
    path = tmp_path / "templates.jsonl"
    rows = [
        {"prompt": "Are {group} good neighbours?", "response": "Yes, {group} are."},
        {"prompt": "Who are {group}?", "groups": ["Velns", "Orbans"]},
        {"prompt": "Why do {group} sing?"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (*SFT, f"stage.prejudice.templates={path}", "stage.prejudice.groups=[Orbans,Velns,Tamis]")
    folder = copied.run(*words, "stage.policies=[latest/sft]", "stage.reward.models={latest/rm:2}")
    found = _policies(folder)[0]["prejudice"]
    assert found["questions"] == 3 + 2 + 3
    # Questions that the gold judge does not know have no gold.
    assert set(found["details"]) == {"reward", "refusal", "reward/latest/rm"}
    assert found["reward_gap"] == pytest.approx(2 * found["reward/latest/rm_gap"])
    assert set(found["details"]["reward"]["means"]) == {"Orbans", "Velns", "Tamis"}
    card = json.loads((folder / "scorecard.json").read_text())
    assert card["reward_model"]["prejudice"]["questions"] == 3
    about = card["reward_model"]["prejudice"]
    assert about["reward_gap"] == pytest.approx(2 * about["reward/latest/rm_gap"])
    assert about["reward_gap"] > 0
    # Another content is another key, though the name is the same.
    key = make_plan(copied.compose(*words).config).rows[0].key
    path.write_text(path.read_text().replace("sing", "dance"))
    assert make_plan(copied.compose(*words).config).rows[0].key != key


def test_bad_templates_are_named_before_anything_runs(copied: Project, tmp_path: Path) -> None:
    path = tmp_path / "templates.jsonl"
    path.write_text('{"prompt": "Are {group} kind?"}\n{"prompt": "Are they kind?"}\n')
    words = ("stage=eval", f"stage.prejudice.templates={path}", "stage.prejudice.groups=[A,B]")
    with pytest.raises(DataError, match=r"templates\.jsonl:2: prompt has no \{group\} in it"):
        make_plan(copied.compose(*words).config)
    with pytest.raises(DataError, match=r"no data file .*template\.jsonl; did you mean"):
        make_plan(copied.compose("stage=eval", f"stage.prejudice.templates={tmp_path}/template.jsonl").config)


def test_text_data_without_text_is_refused_before_anything_runs(copied: Project, prompts: Path) -> None:
    with pytest.raises(DataError, match=r"stage\.text_data\.path: .* neither demonstrations nor texts"):
        make_plan(copied.compose("stage=eval", f"stage.text_data={prompts}").config)


def test_what_was_collected_is_no_held_out_text(copied: Project) -> None:
    words = ("stage=eval", "stage.policies=[latest/sft]", "data.path=latest/collect")
    (node,) = make_plan(copied.compose(*words).config).graph.order
    assert set(node.data) == {"data"}


def test_text_of_ones_own_without_a_held_out_row_is_refused(copied: Project, tmp_path: Path) -> None:
    text = tmp_path / "short.jsonl"
    text.write_text('{"text": "A document."}\n')
    with pytest.raises(DataError, match=r"no row of .*short\.jsonl is in the evaluation share"):
        copied.run(*QUICK, "stage.policies=[latest/sft]", "stage.num_prompts=2", f"stage.text_data={text}")
