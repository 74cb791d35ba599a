"""Whatever is wrong in words or files comes out as one line with the nearest right word."""

import random
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from alignpipe.compose import compose
from alignpipe.compose.composition import built_in_folder, setup
from alignpipe.compose.explain import suggest
from alignpipe.errors import AlignpipeError, ConfigError

PPO = ["stage=ppo", "stage.reward_model=rm"]
RS = ["stage=rs", "stage.reward_model=rm"]
LETTERS = "abcdefghijklmnopqrstuvwxyz_"


def _line(words: list[str]) -> str:
    """The one line that composing these words ends in."""
    with pytest.raises(ConfigError) as caught:
        compose(words)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 700
    return line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["stages.ppo.kl_cof=1"], "there is no key 'stages.ppo.kl_cof'. Did you mean stages.ppo.kl_coef?"),
        (["ppo.kl_coef=1"], "there is no key 'ppo.kl_coef'. Did you mean stages.ppo.kl_coef?"),
        (["kl_coef=1"], "there is no key 'kl_coef'. Did you mean stages.ppo.kl_coef?"),
        (["+stages.ppo.kl_cof=1"], "Did you mean stages.ppo.kl_coef?"),
        (["++stages.ppo.kl_cof=1"], "Did you mean stages.ppo.kl_coef?"),
        (["+foo=1"], "there is no key 'foo'"),
        (["stage=sft", "stage.epohcs=3"], "Did you mean stage.epochs?"),
        (["stge=sft"], "Did you mean stage?"),
        (["stage.lr=3"], "in a pipeline, its stages stand by name"),
        (["stage=sft", "stages.sft.seed=3"], "write stage.seed"),
        (["hydra.job.foo=1"], "there is no key 'hydra.job.foo'"),
        (["stage=sft", "+hydra.job.foo=1"], "there is no key 'hydra.job.foo'"),
        (["stage=sfft"], "there is no option 'sfft' in the group 'stage'. Did you mean sft?"),
        (["pipeline=lama2_style"], "Did you mean llama2_style?"),
        (["experiment=reward_hakcing"], "Did you mean reward_hacking?"),
        (["stage@stages.foo=rm"], "the pipeline has no stage 'foo'; add one with +stage@stages.foo=KIND"),
        (["+stages.ppo.kl_coef=1"], "write stages.ppo.kl_coef=VALUE without the +"),
        (["stage=sft", "stage.learning_rate=fast"], "stage.learning_rate: expected a number, got 'fast'"),
        (["stage=sft", "seed=abc"], "seed: expected a whole number, got 'abc'"),
        (["stage=sft", "seed=4294967296"], "seed: must be at most"),
        (["stage=sft", "trackers=wandb"], "trackers: expected a list"),
        (["stage=sft", "trackers=[wnadb]"], "Did you mean wandb?"),
        (["stage=sft", "data.shares=1"], "data.shares: is a section of keys"),
        (["stage=sft", "seed.x=1"], "seed: holds a value, there are no keys below it"),
        (["stage=sft", "stage.learning_rate=0"], "stage.learning_rate: must be more than 0"),
        (["stage=sft", "stage.learning_rate=-1"], "stage.learning_rate: must be more than 0"),
        (["stage=sft", "stage.learning_rate=nan"], "must be a finite number"),
        (["stage=sft", "stage.learning_rate=inf"], "must be a finite number"),
        (["stage=dpo", "stage.beta=0"], "stage.beta: must be more than 0"),
        (["stage=dpo", "stage.loss=sigmod"], "stage.loss: there is no 'sigmod' here. Did you mean sigmoid?"),
        (
            ["stage=dpo", "stage.loss=ipo", "stage.label_smoothing=0.1"],
            "stage.label_smoothing: loss=ipo does not read it; leave it out, or take loss=conservative or loss=robust",
        ),
        (
            ["stage=dpo", "stage.loss=simpo", "stage.gamma_beta_ratio=null"],
            "loss=simpo needs it; give a number",
        ),
        (["stage=dpo", "stage.reference=null"], "stage.reference: loss=sigmoid needs one"),
        ([*PPO, "stage.kl_coef=-0.1"], "stage.kl_coef: must be at least 0"),
        (
            [*PPO, "stage.gamma=1.5", "stage.clip_range=0"],
            "stage.gamma: must be at most 1",
        ),
        (
            [*PPO, "stage.gamma=1.5", "stage.clip_range=0"],
            "stage.clip_range: must be more than 0",
        ),
        (["stage=eval", "rollout.temperature=0"], "rollout.temperature: must be more than 0"),
        (
            [*RS, "stage.num_samples=1"],
            "stage.num_samples: must be at least 2",
        ),
        (["stage=sft", "stage.batch_size=10", "stage.micro_batch_size=4"], "nearest: 8 or 12"),
        ([*PPO, "stage.kl_controller=adaptiv"], "Did you mean adaptive?"),
        (["stage=sft", "stage.kind=rm"], "choose the whole stage with stage=rm"),
        (["stage=sft", "stage.kind=sftt"], "Did you mean sft?"),
        (["stage=sft", "stage.learning_rate=${foo.bar}"], "${foo.bar} names no key"),
        (["stage=sft", "stage.learning_rate=${seeed}"], "Did you mean ${seed}?"),
        (
            ["stage=sft", "stage.policy=${oc.env:NO_SUCH_VARIABLE}"],
            "the environment variable NO_SUCH_VARIABLE is not",
        ),
        (["stage=sft", "seed=${stage.seed}"], "seed: takes its value from itself"),
        (["stage=rs"], "stage.reward_model: is not set; name a reward model: stage.reward_model=latest/rm"),
        (["stage=sft", "data=file"], "data.path: is empty"),
        (["stage=sft", "model=pretrained"], "model.path: is empty"),
        (
            ["rollout.engine=openai", "rollout.url=http://host:8000/v1"],
            "rollout.engine: openai answers with weights that stand still, and stages.ppo trains its policy after "
            "every rollout; leave rollout.engine=local and say stages.collect.rollout.engine=openai "
            "stages.rs.rollout.engine=openai",
        ),
        (["stages.rs.rollout.engine=openai"], "say where it is: rollout.url=http://HOST:PORT/v1"),
        (
            ["stages.eval.rollout.engine=openai", "rollout.url=http://host:8000/v1"],
            "stages.eval.rollout.engine: a server answers for one policy, stages.eval asks base, ppo, rs, sft",
        ),
        (["stages.ppo.rollout.engine=openai"], "there is no key 'stages.ppo.rollout"),
        *(
            (
                ["stage=collect", "rollout.engine=openai", f"rollout.url={url}"],
                "rollout.url: must be http://HOST",
            )
            for url in (
                "host:8000",
                "ftp://host/v1",
                "http://joe@host/v1",
                "http://",
                "http://host/v1?key\\=a",
            )
        ),
        (["model.compile=true", "adapter=lora"], "model.compile: not with adapter=lora"),
        (["model.compile=true", "launch=fsdp2"], "model.compile: not with launch=fsdp2"),
        (["model.kernels=ligr"], "Did you mean liger?"),
        (["seed=1,2"], "sweep over them with -m"),
        (["-m", "seed=1,2"], "-m makes several runs"),
        (["~stages.ppo.kl_coef"], "keys cannot be taken out"),
        (["~nothing"], "there is nothing of that name"),
        (["~pipeline"], "there is nothing to run"),
        (["sft"], "Did you mean stage=sft?"),
        (["zephyr_style"], "Did you mean pipeline=zephyr_style?"),
        (["=3"], "there is no key before the ="),
        (["x=a=b"], "'x=a=b' cannot be read"),
        (["run.name=한글"], "'run.name=한글' cannot be read"),
        (["seed=1", "--foo"], "unrecognized arguments: --foo"),
        (["--config-path", "/tmp"], "--config-path is not taken"),
        (["--config-dir", "/no/such/folder"], "there is no folder /no/such/folder"),
        (["stage=sft", "+stage._target_=os.system"], "a stage is chosen by its kind"),
        (["stage=sft", "model.training.sft.foo=1"], "there is no key 'model.training.sft.foo'"),
        (["stage=sft", "+model.training.sft.foo=1"], "there is no key 'model.training.sft.foo'"),
        (["stage=sft", "+model.training.sft.weight_decay=1"], "no stage reads it"),
        (["stage=sft", "+model.training.sfft.epochs=1"], "Did you mean sft?"),
        (["stage=sft", "+data.world.mix.facts=1"], "Did you mean fact?"),
        (["stage=sft", "output_dir=''"], "output_dir: is empty"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_word_gets_one_line(words: list[str], expected: str) -> None:
    assert expected in _line(words)


@pytest.mark.parametrize("name", ["../x", "-rf", "''", "a" * 300, "CON", "con.txt", '"a\\nb"', ".", "a/b"])
def test_run_name_that_is_no_folder_name_is_refused(name: str) -> None:
    with pytest.raises(AlignpipeError) as caught:
        compose(["stage=sft", f"run.name={name}"])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "secret",
    [
        "hf_abcdefghijklmnopqrstuvwx",
        "sk-abcdefghijklmnopqrstuvwx",
        "AKIAABCDEFGHIJKLMNOP",
        "https://me:password@example.org/x",
    ],
)
def test_secret_is_refused_and_not_repeated(
    secret: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert secret not in _line(["stage=sft", f"model.revision={secret}"])
    monkeypatch.setenv("MY_SECRET", secret)
    line = _line(["stage=sft", "model.revision=${oc.env:MY_SECRET}"])
    assert "model.revision: looks like a secret" in line
    assert secret not in line
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(
        f"defaults: [tiny, _self_]\nmax_length: '{secret}'\n", encoding="utf-8"
    )
    assert secret not in _line(["stage=sft", "model=mine", "--config-dir", str(tmp_path)])


def test_bad_root_value_is_named_once() -> None:
    assert _line(["stage=sft", "seed=-1"]) == "seed: must be at least 0, got -1"


def test_several_problems_come_together() -> None:
    line = _line(["stage=sft", "stage.learning_rate=0", "stage.epochs=0", "run.name=ok"])
    assert line.count(";") == 1


def test_failed_composition_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _line(["stage=sft", "stage.epohcs=1"])
    compose(["stage=sft"])
    assert list(tmp_path.iterdir()) == []


def _tree() -> dict[str, Any]:
    setup(None)
    with hydra.initialize_config_dir(str(built_in_folder()), version_base="1.3"):
        raw = hydra.compose("config", ["+stage@stages.dpo=dpo"])
    tree: dict[str, Any] = OmegaConf.to_container(raw)  # type: ignore[assignment]
    return tree


def _keys(node: Any, above: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    return [
        key for name, value in node.items() for key in [f"{above}{name}", *_keys(value, f"{above}{name}.")]
    ]


def _slip(word: str, rng: random.Random) -> str:
    """One slip of the hand: a letter too many, too few, another, or two in the wrong order."""
    at = rng.randrange(len(word))
    letter = rng.choice([other for other in LETTERS if other != word[at]])
    slips = [word[:at] + letter + word[at:], word[:at] + letter + word[at + 1 :]]
    if len(word) > 2:
        slips.append(word[:at] + word[at + 1 :])
    if at + 1 < len(word) and word[at] != word[at + 1]:
        slips.append(word[:at] + word[at + 1] + word[at] + word[at + 2 :])
    return rng.choice(slips)


def test_slip_in_any_key_finds_the_key_again() -> None:
    tree = _tree()
    keys = [key for key in _keys(tree) if not key.startswith("stages.") or key.count(".") > 1]
    rng = random.Random(0)
    tried, right, missed = 0, 0, []
    for key in keys:
        above, _, leaf = key.rpartition(".")
        siblings = {other.rpartition(".")[2] for other in keys if other.rpartition(".")[0] == above}
        slipped = _slip(leaf, rng)
        if slipped in siblings:
            continue
        found = suggest(f"{above}.{slipped}".lstrip("."), tree)
        tried += 1
        right += key in found[:1]
        missed += [] if key in found[:1] else [(key, slipped, found)]
    assert tried > 250
    assert right / tried >= 0.95, missed
