"""The benchmarks: the same workload every time, figures that follow from what was measured, cases that run."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import __main__ as every
from benchmarks import gpu_peers, growth, pipeline, sft, workload
from benchmarks.case import CPU_SIZES, SIZES, Case, Measured, Side
from benchmarks.clock import Clock
from benchmarks.runner import Options, build, compare, main
from benchmarks.table import Result, difference, line, rate

TINY = replace(SIZES["S"], hidden=32, intermediate=64, layers=1, heads=2, vocabulary=400, rows=8, pairs=4)


@pytest.mark.parametrize(("name", "millions"), [("S", 3.05), ("M", 29.5), ("1B", 1040.3)])
def test_models_have_the_size_that_is_told(name: str, millions: float) -> None:
    size = SIZES[name]
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(weight.numel() for weight in model.parameters()) == size.num_parameters
    assert size.num_parameters / 1e6 == pytest.approx(millions, rel=2e-3)


def _public(folder: Path) -> Path:
    """Files laid out as the public data; a row of each is too long."""
    questions = [f"How many are {n} and {n + 1} apples?" for n in range(60)]
    long = "apples " * 600
    rows = [{"question": text, "answer": f"They are {len(text)}.\n#### 1"} for text in questions]
    rows.insert(1, {"question": long, "answer": "Many."})
    shared = [f"\n\nHuman: {text}\n\nAssistant: " for text in questions]
    pairs = [{"chosen": f"{text}Let us count.", "rejected": f"{text}No."} for text in shared]
    pairs.insert(1, {"chosen": f"{shared[0]}{long}", "rejected": f"{shared[0]}No."})
    for name, found in (("gsm8k_train", rows), ("hh_harmless_pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def test_workload_is_the_same_every_time_and_its_ids_are_those_of_its_rows(tmp_path: Path) -> None:
    data = _public(tmp_path)
    for name in ("one", "other"):
        workload.build(tmp_path / name, TINY, data, "alpaca")
    one = tmp_path / "one"
    files = [path.relative_to(one) for path in one.rglob("*") if path.is_file()]
    assert Path("policy/model.safetensors") in files and Path("reward/model.safetensors") in files
    for file in files:
        assert (one / file).read_bytes() == (tmp_path / "other" / file).read_bytes(), file

    tokenizer = AutoTokenizer.from_pretrained(one / "policy")
    assert len(tokenizer) == TINY.vocabulary
    rows, ids = _lines(one / workload.DEMONSTRATIONS), workload.ids_of(one, "demonstrations")
    assert len(rows) == len(ids) == TINY.rows
    for row, found in zip(rows, ids, strict=True):
        turns = [_turn("user", row["prompt"]), _turn("assistant", row["response"])]
        assert found["ids"] == tokenizer.apply_chat_template(turns, return_dict=False)
        learnt = [token for token, is_learnt in zip(found["ids"], found["mask"], strict=True) if is_learnt]
        assert tokenizer.decode(learnt) == row["response"] + tokenizer.eos_token
    rows, ids = _lines(one / workload.PAIRS), workload.ids_of(one, "pairs")
    assert len(rows) == len(ids) == TINY.pairs
    for row, found in zip(rows, ids, strict=True):
        opened = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        assert found["prompt"] == opened
        for side in ("chosen", "rejected"):
            assert tokenizer.decode(found[side]) == row[side] + tokenizer.eos_token
    both = [len(row["prompt"] + row[side]) for row in ids for side in ("chosen", "rejected")]
    assert workload.num_tokens(one, "pairs") == sum(both)
    for length in (80, 400):
        prompts = workload.ids_of(one, str(length))
        assert {len(prompt) for prompt in prompts} == {length} and len(prompts) == TINY.questions


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(row) for row in path.read_text().splitlines()]


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_one_token_in_so_many_stops() -> None:
    stops = workload.stop_ids(SIZES["S"], 64)
    assert len(stops) == 2048 // 64 and len(set(stops)) == len(stops)
    assert min(stops) > 4 and max(stops) < 2048
    assert workload.stop_ids(SIZES["S"], None) == []


def test_clock_cuts_steps_into_repetitions_and_leaves_the_first_out() -> None:
    clock = Clock()
    clock.marks = [0.0, 9.0, 10.0, 11.0, 13.0, 14.0, 18.0]
    assert clock.repetitions(2) == [3.0, 5.0]
    with pytest.raises(ValueError, match="6 steps are not 4"):
        clock.repetitions(3)


def _measured(second: float, *, peak: int = 100, losses: tuple[float, ...] = (2.0, 1.0)) -> Measured:
    return Measured([second, second, 99.0], [600, 600, 600], peak, list(losses), [1e9, 3e9])


def _result(theirs: tuple[float, ...] = (2.0, 1.0)) -> Result:
    sides = [Side(label, "") for label in ("ours", "padded", "packed")]
    case = Case("sft", sides[0], tuple(sides[1:]), {"S": 2.0}, 6, same_losses=True, max_memory=0.6)
    peers = {
        "padded": [_measured(second, losses=theirs) for second in (5.0, 7.0, 7.0)],
        "packed": [_measured(second, peak=200, losses=(9.0,)) for second in (3.0, 8.0, 4.0)],
    }
    return Result(case, "S", [_measured(second) for second in (1.0, 2.0, 4.0)], peers)


def test_result_is_the_median_of_pairs_against_the_fastest_peer() -> None:
    result = _result()
    assert rate(result.ours[0]) == 600
    assert result.best == "packed"
    assert result.ratios == pytest.approx([3.0, 4.0, 1.0])
    assert result.memory == 0.5
    # Six operations a parameter and token, 300 tokens a second, of two billion operations a second.
    assert result.share(result.ours) == pytest.approx(6 * SIZES["S"].num_parameters * 300 / 2e9)
    cells = [cell.strip() for cell in line(result).strip("|").split("|")]
    assert cells[:5] == ["sft", "S", "packed", "3.00 (1.00, 4.00)", "2.0: met"]
    assert cells[8:] == ["0.50", "0.6: met", "0e+00", "padded 3.50, 1.00; packed 3.00, 0.50"]
    assert line(replace(result, size="M")).split("|")[5].strip() == ""


def test_a_share_of_the_matrix_rate_that_has_to_be_reached_is_told() -> None:
    result = _result()
    share = result.share(result.ours)
    for least, told in ((share / 2, "met"), (share * 2, "no")):
        case = replace(result.case, min_share=least)
        assert f"(at least {least:.0%}: {told}), " in line(replace(result, case=case))


def test_losses_are_held_against_the_first_peer_at_every_step() -> None:
    assert difference([2.0, 1.0], [2.0, 1.25]) == pytest.approx(0.2)
    assert _result((2.0, 1.0009)).losses_agree
    apart = _result((2.0, 1.002))
    assert not apart.losses_agree and "FAILED" in line(apart)
    with pytest.raises(ValueError, match="is shorter"):
        _ = _result((2.0,)).losses_agree


def test_growth_is_the_most_over_the_least() -> None:
    flat = growth.Cost(1.0, 2e-6, 100)
    told = growth.verdicts({1: [flat], 2: [growth.Cost(1.0, 2.4e-6, 105)]})
    assert "1.20 of the least" in told[0] and told[0].endswith("no")
    assert "1.05 of the least" in told[1] and told[1].endswith("met")
    assert growth.line(1000, [flat]) == "| 1,000 | 1.0 | 2 | 0 |"


def test_pipeline_line_says_whether_the_median_is_in_time() -> None:
    assert pipeline.line("whole", [80.0, 89.0, 120.0], 90.0) == "| whole | 89.0 (80.0, 120.0) | 90: met |"
    assert pipeline.line("whole", [91.0], 90.0).endswith("90: no |")


@pytest.mark.parametrize(
    ("cases", "sizes"), [(every.CASES, CPU_SIZES), (gpu_peers.CASES, (gpu_peers.SIZE,))], ids=["cpu", "gpu"]
)
def test_every_case_has_targets_of_its_sizes_and_labels_of_its_own(
    cases: tuple[Case, ...], sizes: tuple[str, ...]
) -> None:
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) == 8
    for case in cases:
        assert set(case.targets) <= set(sizes) <= set(SIZES)
        for size in (SIZES[name] for name in sizes):
            # A repetition has whole steps, and a rollout every question.
            for rows in (size.rows, size.quick_rows):
                of_case = rows if case.name == "sft" else rows // 2
                assert of_case % case.settings.get("batch_size", of_case) == 0
            assert case.settings.get("rollout_size", size.questions) == size.questions
        labels = [side.label for side in (case.ours, *case.peers)]
        assert len(set(labels)) == len(labels)


@pytest.mark.slow
def test_a_case_runs_from_end_to_end_and_its_losses_are_the_peers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl", minversion="1.16", reason="TRL is of the test extra")
    words = "sft --sizes S --rows 16 --pairs 1 --repetitions 1 --threads 1"
    assert main(every.CASES, [*shlex.split(words), "--out", str(tmp_path / "found.json")]) == 0
    assert "| sft | S | SFTTrainer " in capsys.readouterr().out
    (found,) = json.loads((tmp_path / "found.json").read_text())["results"]
    assert found["loss_difference"] < 1e-3
    assert set(found["sides"]) == {"alignpipe", *(peer.label for peer in sft.CASES[0].peers)}
    for side in found["sides"].values():
        assert len(side["runs"]) == 1 and side["runs"][0]["peak"] > 1e8
        assert len(side["runs"][0]["seconds"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo", "sample-mixed", "ppo"])
def test_a_case_of_the_gpu_runs_in_bf16_on_a_cpu_too(name: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", minversion="1.16", reason="TRL is of the test extra")
    (case,) = (case for case in gpu_peers.CASES if case.name == name)
    fewer = {"batch_size": 4, "rollout_size": 16, "response_length": 16, "attention": "sdpa"}
    options = Options(pairs=1, repetitions=1, threads=1, rows=8, first_peer=True)
    small = replace(case, device="cpu", settings={**case.settings, **fewer})
    result = compare(small, "S", build(tmp_path, "S", options), options)
    assert result.losses_agree and all(ratio > 0 for ratio in result.ratios)


def test_without_a_gpu_nothing_is_compared_there(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert gpu_peers.run([]) == 5
    assert "no CUDA device" in capsys.readouterr().err
