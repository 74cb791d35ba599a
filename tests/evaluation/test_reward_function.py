"""The user's function, called as it is: what it may return, and what its mistakes look like."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alignpipe.errors import AlignpipeError
from alignpipe.evaluation.reward_function import RewardFunction
from alignpipe.task import FunctionInput

PROMPTS = [f"Question {index}?" for index in range(9)]
RESPONSES = [f"Answer {index}." for index in range(9)]
Load = Callable[..., RewardFunction]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Write a file, and load the function that it defines on its third line."""

    def load(body: str, head: str = "import math") -> RewardFunction:
        path = tmp_path / "my_reward.py"
        path.write_text(f"{head}\n\ndef score(prompts, responses):\n    {body}\n", encoding="utf-8")
        os.utime(path, (1, 1))
        key = hashlib.sha256(path.read_bytes()).hexdigest()
        return RewardFunction(FunctionInput("./my_reward.py:score", str(path), "score", key))

    return load


@pytest.mark.parametrize(
    "body",
    [
        "return [len(r) for r in responses]",
        "return tuple(float(len(r)) for r in responses)",
        "return __import__('numpy').array([len(r) for r in responses])",
        "return __import__('torch').tensor([len(r) for r in responses])",
        "return [__import__('numpy').float32(len(r)) for r in responses]",
    ],
)
def test_any_sequence_of_numbers_is_taken(load: Load, body: str) -> None:
    scores = load(body)(PROMPTS, RESPONSES)
    assert scores.dtype == np.float64
    assert scores.tolist() == [9.0] * 9


def test_truth_values_are_0_and_1(load: Load) -> None:
    scores = load("return [p[9] == r[7] and r != 'Answer 3.' for p, r in zip(prompts, responses)]")
    assert scores(PROMPTS, RESPONSES).tolist() == [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_function_may_change_its_lists_and_no_other(load: Load) -> None:
    prompts = list(PROMPTS)
    load("prompts.clear(); return [0] * len(responses)")(prompts, RESPONSES)
    assert prompts == PROMPTS


def test_modules_beside_the_file_are_found(load: Load, tmp_path: Path) -> None:
    (tmp_path / "beside_my_reward.py").write_text("WORTH = 4\n")
    assert load("return [WORTH] * 9", "from beside_my_reward import WORTH")(PROMPTS, RESPONSES)[0] == 4


def test_edit_within_the_same_second_is_what_runs(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.dont_write_bytecode", False)
    # Python's own import would take the compiled file of the first, which has the same size and time.
    found = [load(f"return [{worth}] * 9")(PROMPTS, RESPONSES)[0] for worth in (1, 2)]
    assert found == [1, 2]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("return [0.0] * 8", "my_reward.py:3: returned 8 numbers for 9 responses"),
        ("return None", "my_reward.py:3: returned a NoneType, not a sequence of numbers"),
        ("return 1.0", "my_reward.py:3: returned a float, not a sequence of numbers"),
        ("return '123456789'", "my_reward.py:3: returned a str, not a sequence of numbers"),
        ("return dict.fromkeys(range(9))", "my_reward.py:3: returned a dict, not"),
        (
            "return [0] * 8 + [math.nan]",
            "my_reward.py:3: returned nan for prompts[8] = 'Question 8?', not a finite",
        ),
        ("return [0, -math.inf] + [0] * 7", "returned -inf for prompts[1]"),
        ("return [0, 0, '1'] + [0] * 6", "returned '1' for prompts[2]"),
        ("return [[0, 1]] * 9", "returned [0, 1] for prompts[0]"),
        (
            "return [1 / (p != 'Question 5?') for p in prompts]",
            "my_reward.py:4: ZeroDivisionError: division by zero, ",
        ),
        ("return [1 / (p != 'Question 5?') for p in prompts]", "at prompts[5] = 'Question 5?'"),
        ("raise ValueError('no' + chr(10) + 'more')", "my_reward.py:4: ValueError: no, at prompts[0]"),
        ("return [1 / (len(prompts) < 9)] * 9", "division by zero, in a call with 9 responses"),
        ("math.sqrt('x')", "my_reward.py:4: TypeError: must be real number, not str"),
        ("raise SystemExit(0)", "my_reward.py:4: SystemExit: 0"),
    ],
)
def test_mistake_is_one_line_with_its_place(load: Load, body: str, told: str) -> None:
    with pytest.raises(AlignpipeError) as caught:
        load(body)(PROMPTS, RESPONSES)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 1


def test_traceback_of_the_users_code_is_kept_and_ours_is_no_error(load: Load) -> None:
    with pytest.raises(AlignpipeError) as caught:
        load("return math.sqrt(-1)")(PROMPTS, RESPONSES)
    assert caught.value.trace is not None and "return math.sqrt(-1)" in caught.value.trace
    with pytest.raises(AlignpipeError) as caught:
        load("return [0]")(PROMPTS, RESPONSES)
    assert caught.value.trace is None


def test_file_that_cannot_be_loaded_is_told(load: Load) -> None:
    with pytest.raises(AlignpipeError, match=r"my_reward.py:1: ModuleNotFoundError: .*, while it was loaded"):
        load("return []", "import nowhere_to_be_found")


def test_file_that_changed_since_the_key_was_made_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "my_reward.py"
    path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    for place in (path, tmp_path / "gone.py"):
        with pytest.raises(AlignpipeError, match="has changed since this run was planned"):
            RewardFunction(FunctionInput("./my_reward.py:score", str(place), "score", "0" * 64))
    assert not (tmp_path / "ran").exists()


def test_name_that_is_no_function_is_told(load: Load) -> None:
    with pytest.raises(AlignpipeError, match="is None, not a function"):
        load("return []\n\nscore = None")
