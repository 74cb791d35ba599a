"""A user's own YAML wins over the built-in files, and its faults are told with file and line."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from alignpipe.compose import compose
from alignpipe.compose.composition import built_in_folder
from alignpipe.errors import ConfigError

PPO = "defaults:\n  - /schema/ppo@_here_\n  - _self_\n"
BOMB = "\n".join(
    [
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]",
        *(f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]" for old, new in zip("abcd", "bcde", strict=True)),
    ]
)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., str]:
    """Write files into a configuration folder and name it."""

    def write(**files: str | bytes) -> str:
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(tmp_path)

    return write


def test_users_file_wins_over_the_built_in_one_of_the_same_name(folder: Callable[..., str]) -> None:
    text = (built_in_folder() / "stage" / "sft.yaml").read_text(encoding="utf-8")
    where = folder(stage__sft=text.replace("seed: ${seed}", "seed: 77"))
    composed = compose(["stage=sft", "--config-dir", where])
    assert composed.config.stage is not None
    assert composed.config.stage.seed == 77


def test_environment_names_the_folder_and_the_flag_wins_over_it(
    folder: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    where = folder(rollout__hot="defaults: [local, _self_]\ntemperature: 2.0\n")
    monkeypatch.setenv("ALIGNPIPE_CONFIG_DIR", where)
    assert compose(["stage=sft", "rollout=hot"]).config.rollout.temperature == 2.0
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ConfigError, match="there is no option 'hot'"):
        compose(["stage=sft", "rollout=hot", "--config-dir", str(other)])


def test_folder_of_one_call_does_not_linger_in_the_next(folder: Callable[..., str]) -> None:
    where = folder(rollout__hot="defaults: [local, _self_]\ntemperature: 2.0\n")
    compose(["stage=sft", "rollout=hot", "--config-dir", where])
    with pytest.raises(ConfigError, match="there is no option 'hot'"):
        compose(["stage=sft", "rollout=hot"])


def test_users_pipeline_runs_its_own_stages(folder: Callable[..., str]) -> None:
    where = folder(
        pipeline__two="# @package _global_\ndefaults:\n  - /stage@stages.a: sft\n  - /stage@stages.b: sft\n"
        "  - _self_\npipeline: {name: two, order: [a, b]}\nstages:\n  b: {policy: a}\n"
    )
    config = compose(["pipeline=two", "--config-dir", where]).config
    assert [config.stages[name].kind for name in ("a", "b")] == ["sft", "sft"]


@pytest.mark.parametrize(
    ("name", "text", "word", "expected"),
    [
        ("stage__a", PPO + "kl_cof: 1\n", "stage=a", r"a\.yaml:4: .*Did you mean stage\.kl_coef\?"),
        (
            "stage__a",
            "kl_coef: 1\n",
            "stage=a",
            r"a\.yaml:1: begin the file with `defaults: ",
        ),
        (
            "stage__a",
            "defaults: [ppo, _self_]\nkl_coef: fast\n",
            "stage=a",
            r"a\.yaml:2: .*a number",
        ),
        ("stage__a", "defaults: [pppo, _self_]\n", "stage=a", r"stage/a\.yaml: there is no option 'pppo'"),
        (
            "experiment__x",
            "# @package _global_\nstages:\n  ppo: {kl_cof: 2}\n",
            "experiment=x",
            r"x\.yaml:3: .*Did you mean stages\.ppo\.kl_coef\?",
        ),
        ("experiment__x", "stages:\n  ppo: {kl_coef: 2}\n", "experiment=x", r"# @package _global_"),
        ("model__z", "- a\n", "model=z", r"z\.yaml: must hold `key: value` lines"),
        ("model__z", "", "model=z", r"z\.yaml: is empty"),
        ("model__z", "a: [1\nb: 2\n", "model=z", r"z\.yaml:2:2: not YAML"),
        ("model__z", "a:\n\tb: 2\n", "model=z", r"z\.yaml:2:1: not YAML"),
        (
            "model__z",
            "path: x\nrevision: y\npath: z\n",
            "model=z",
            r"z\.yaml:3: .*stands in line 1",
        ),
        ("model__z", "path: no\n", "model=z", r"z\.yaml:1: YAML reads no as a truth value; quote it"),
        ("model__z", "max_length: 010\n", "model=z", r"z\.yaml:1: YAML reads 010 as another number"),
        ("model__z", "max_length: 1:30\n", "model=z", r"z\.yaml:1: YAML reads 1:30 as another number"),
        ("model__z", "path: !!python/object:os.system x\n", "model=z", r"z\.yaml:1: the tag .* refused"),
        ("model__z", "path: x\n_target_: os.system\n", "model=z", r"z\.yaml:2: _target_ is refused"),
        ("model__z", BOMB, "model=z", r"z\.yaml: more than 10000 values"),
        ("model__z", "a: &a {b: *a}\n", "model=z", r"z\.yaml:1: an anchor that holds itself"),
        ("model__z", "path: caf\xe9\n".encode("latin1"), "model=z", r"z\.yaml: not UTF-8 at byte 9"),
        (
            "model__z",
            "defaults: [tiny, _self_]\npath: ${no.key}\n",
            "model=z",
            r"z\.yaml:2: model\.path: ",
        ),
        ("config", "seed: 1\n", "seed=2", r"the first file composed must begin with"),
    ],
)
def test_fault_in_a_file_is_told_with_its_place(
    name: str, text: str | bytes, word: str, expected: str, folder: Callable[..., str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        compose([word, "--config-dir", folder(**{name: text})])
    line = str(caught.value)
    assert "\n" not in line
    assert re.search(expected, line), line
