"""Secrets, by whatever way they come, stand in no file that is written and in no line that is told."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.table import Faults
from tests.project import SMALL

SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWx",
    # Of no form that could be known.
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "ALIGNPIPE_ROLLOUT_API_KEY": "plain-words-and-a-number-7",
    "DATABASE_PASSWORD": "correct horse",
}
TYPED = "Tr0ub4dor"
SMALLEST = " ".join((*SMALL, "model.training.sft.max_steps=1", "model.training.sft.num_samples=2"))
KEY = SECRETS["WANDB_API_KEY"]
# Ways into a configuration; each is refused.
REFUSED = [
    f"run stage=sft model.revision={SECRETS['HF_TOKEN']}",
    f"run stage=sft model.revision={KEY}",
    f"run stage=sft run.name={KEY}",
    f"run stage=sft model=owner/{KEY}",
    f"run stage=sft model.revision_{KEY}=1",
    f"run -m stage=sft seed=1,2 sweep.name={KEY}",
    "run stage=sft 'model.revision=${oc.env:WANDB_API_KEY}'",
    "run stage=sft 'output_dir=out/${oc.env:ALIGNPIPE_ROLLOUT_API_KEY}/x'",
    "run stage=sft 'run.name=\"${oc.decode:${oc.env:WANDB_API_KEY}}\"'",
    "run stage=sft experiment=mine --config-dir conf",
    f"run stage=sft data=https://joe:{TYPED}@host/rows.jsonl",
    f"run stage=sft 'data=https://host/rows.jsonl?access_token={TYPED}'",
    f"data check https://joe:{TYPED}@host/rows.jsonl",
    f"config search {SECRETS['HF_TOKEN']}",
    f"status {SECRETS['HF_TOKEN']}",
    f"ls --token={SECRETS['HF_TOKEN']}",
]


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Where a secret stands: the files of the working folder, or what was printed."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    text = "# @package _global_\nmodel: {revision: '${oc.env:WANDB_API_KEY}'}\n"
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text)

    def look(printed: str) -> list[str]:
        files = {str(path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        texts = {
            **files,
            **{str(path): str(path).encode() for path in tmp_path.rglob("*")},
            "told": printed.encode(),
        }
        return [
            f"{secret} in {name}"
            for name, text in texts.items()
            for secret in (*SECRETS.values(), TYPED)
            if secret.encode() in text
        ]

    return look


def test_secret_in_a_configuration_is_refused_and_not_repeated(
    typed: Callable[..., tuple[int, str]], found: Callable[[str], list[str]], tmp_path: Path, faults: Faults
) -> None:
    for line in REFUSED:
        code, told = typed(tmp_path, line)
        assert code == 2, f"{line}: {told}"
        assert found(told) == []
        assert "looks like a secret" in told or not line.startswith(("run", "data")), told
        assert told.count("\n") == 1, told
    assert not (tmp_path / "outputs").exists()
    faults.tell("secrets: in no file and no line", len(REFUSED), len(REFUSED))


REWARD = """import os

def score(prompts, responses):
    raise ValueError(f"no answer for {os.environ['HF_TOKEN']}")
"""


def test_secret_of_the_environment_is_in_nothing_that_a_run_leaves(
    typed: Callable[..., tuple[int, str]], found: Callable[[str], list[str]], tmp_path: Path, faults: Faults
) -> None:
    code, told = typed(tmp_path, f"run stage=sft {SMALLEST}")
    assert (code, found(told)) == (0, [])
    # A function of the user's fails, and says too much.
    (tmp_path / "reward.py").write_text(REWARD)
    words = "stage=rs stage.reward_model=null stage.reward.function=./reward.py:score stage.num_prompts=4"
    code, told = typed(tmp_path, f"run {words} {SMALLEST}")
    assert code == 1, told
    assert "no answer for ***" in told
    assert "no answer for ***" in next((tmp_path / "outputs").rglob("*.error.log")).read_text()
    assert found(told) == []
    faults.tell("secrets: in no file and no line", 2, 2)
