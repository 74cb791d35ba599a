"""What docs/memory.md shows is what the plan prints, and each line of its arithmetic gives the part it stands for.

The function and the commands of docs/rewards.md work.
"""

import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from rich.console import Console

from alignpipe.compose.composition import compose
from alignpipe.evaluation.reward_function import RewardFunction
from alignpipe.pipeline.functions import find_function
from alignpipe.pipeline.plan import Plan, make_plan
from alignpipe.pipeline.plan_table import print_plan
from tests.project import SMALL

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [block.replace("\\\n", "") for block in BLOCKS if block.startswith("$ alignpipe plan")]
ARITHMETIC = re.compile(r"(\w+)\.(\w+) = ([0-9*/+() ]+) = ([0-9.]+) GB")


@cache
def _plan(command: str) -> Plan:
    words = shlex.split(command.replace("docs/shapes", f"{ROOT}/docs/shapes"))[3:]
    return make_plan(compose(words).config, bare=True)


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: " ".join(block.splitlines()[0].split()[3:5]))
def test_shown_plan_is_what_the_command_prints(block: str) -> None:
    printed = io.StringIO()
    print_plan(_plan(block.splitlines()[0]), Console(file=printed, width=100, highlight=False))
    lines = printed.getvalue().splitlines()
    for line in block.splitlines()[1:]:
        assert line in lines
        assert len(line) <= 100 or line.startswith("warning:")


def test_arithmetic_gives_the_parts_of_the_plan_above_it() -> None:
    seen = 0
    plan = None
    for block in BLOCKS:
        if block.startswith("$ alignpipe plan"):
            plan = _plan(block.replace("\\\n", "").splitlines()[0])
        for stage, part, sum_, shown in ARITHMETIC.findall(block):
            assert plan is not None
            found = next(row.estimate for row in plan.rows if row.name == stage)
            assert found is not None
            # Nothing but digits and operators: the pattern says so.
            value = eval(sum_)
            assert value == pytest.approx(getattr(found.memory, part), rel=1e-9), f"{stage}.{part}"
            assert f"{value / 1e9:.2f}" == shown
            seen += 1
    assert seen == TEXT.count(" GB\n") > 20


def test_docs_say_that_large_models_are_planned_and_not_run() -> None:
    assert "**The tables below are planned, not run**" in TEXT


REWARDS = (ROOT / "docs" / "rewards.md").read_text(encoding="utf-8")


def test_rewards_page_has_a_function_that_works_and_commands_that_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = re.findall(r"^```python\n(.*?)^```$", REWARDS, flags=re.MULTILINE | re.DOTALL)
    Path("my_reward.py").write_text(source, encoding="utf-8")
    score = RewardFunction(find_function("reward.function", "./my_reward.py:score"))
    assert score(["Why?"] * 3, ["No.", "one two three four five", "word " * 31]).tolist() == [0.0, 1.0, 0.0]
    commands = re.findall(r"^alignpipe plan (.*)$", REWARDS.replace("\\\n", ""), flags=re.MULTILINE)
    plans = [make_plan(compose([*SMALL, *shlex.split(command)]).config) for command in commands]
    reads = [row.reads for plan in plans for row in plan.rows]
    assert len(commands) == 3
    for shown in ("reward=1*rm+0.5*my_reward.py:score", "reward=1*my_reward.py:score", "gate=safety_rm<0.15"):
        assert any(shown in words for words in reads), shown
