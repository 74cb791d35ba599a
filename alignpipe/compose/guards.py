"""Checks on words and configurations that no field alone can make: secrets, names, keys nobody reads."""

import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignpipe.compose.yaml_files import CODE_KEYS, key_lines
from alignpipe.config import BASE, KINDS, LATEST, NEWEST, Config, StageConfig
from alignpipe.errors import ConfigError, MachineError, did_you_mean, several
from alignpipe.secrets import hide_secrets, holds_secret

PIPELINES = (
    "llama2_style",
    "instructgpt_style",
    "zephyr_style",
    "from_scratch",
    "llama2_rounds",
    "online_dpo",
)
TRACKERS = ("tensorboard", "wandb")
# Word that needs a plugin of Hydra's -> the plugin, and our extra that brings it.
_PLUGINS = {
    "hydra/launcher=joblib": ("hydra_joblib_launcher", "sweep"),
    "hydra/launcher=submitit_local": ("hydra_submitit_launcher", "slurm"),
    "hydra/launcher=submitit_slurm": ("hydra_submitit_launcher", "slurm"),
    "hydra/sweeper=optuna": ("hydra_optuna_sweeper", "sweep"),
}
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# Windows gives these names to devices, with any suffix; a run may be copied there.
_DEVICE_NAMES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
# A table given as a value: key={_target_: ...}.
_NAMES_CODE = re.compile(rf"(?<!\w)({'|'.join(CODE_KEYS)})['\"]?\s*:")
# Keys whose values Hydra and logging call, and the classes that may stand there: of plugins, and none by another way.
_CALLED = ("_target_", "()", "class")
_CLASSES = re.compile(
    r"hydra_plugins\.\w+\.\w+\.\w+(Launcher|Sweeper)|hydra\._internal\.core_plugins\.basic_\w+\.Basic\w+|"
    r"optuna\.samplers\.\w+Sampler|logging\.(Stream|File)Handler"
)
_READS = re.compile(r"\$\{model\.training\.(\w+)\.(\w+)\}")


def check_words(words: list[str]) -> None:
    """Refuse words that hold a secret, name code, or are no `key=value`.

    Raises:
        ConfigError: the value of a secret is not repeated.
        MachineError: a word needs a plugin of Hydra's that is not installed.
    """
    for word in words:
        _check_plugin(word)
        key, equals, value = word.partition("=")
        if holds_secret(word):
            raise ConfigError(_secret(hide_secrets(key)))
        if any(name in re.split(r"[.@+~]", key) for name in CODE_KEYS) or _NAMES_CODE.search(value):
            raise ConfigError(
                f"{key}: refused, no configuration names code to run; a stage is chosen by its kind"
            )
        if not equals and not key.startswith("~"):
            known = {*KINDS, *PIPELINES}
            group = "stage" if key in KINDS else "pipeline"
            hint = f"Did you mean {group}={key}?" if key in known else "For example seed=1."
            raise ConfigError(f"{word!r} is no word of the form key=value. {hint}")
        if equals and not key.strip("+~"):
            raise ConfigError(f"{word!r}: there is no key before the =; write key=value")


def _check_plugin(word: str) -> None:
    plugin, extra = _PLUGINS.get(word.lstrip("+"), ("", ""))
    # The package that holds all plugins is itself not there while none is installed.
    if plugin and (find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{plugin}") is None):
        raise MachineError(f"{word}: its plugin is not installed; pip install 'alignpipe[{extra}]'")


def check_hydra(settings: DictConfig) -> None:
    """Refuse what Hydra would call besides its own launchers and sweepers, wherever it came from.

    Args:
        settings: Hydra's own part of a composition, which may still hold interpolations.

    Raises:
        ConfigError: a callback, or a class of somebody else's.
    """
    for name in ("callbacks", "launcher", "sweeper", "job_logging", "hydra_logging"):
        section = settings.get(name) or {}
        if any(not _CLASSES.fullmatch(target) for target in _called(section)) or (
            name == "callbacks" and section
        ):
            raise ConfigError(
                f"hydra.{name}: refused, no configuration names code to run; leave it out, "
                f"or take a launcher or sweeper by hydra/launcher=NAME, hydra/sweeper=NAME"
            )


def _called(node: Any) -> Iterator[str]:
    """What a tree names to be called, interpolations followed."""
    for key in node if OmegaConf.is_dict(node) else range(len(node)):
        try:
            value = None if OmegaConf.is_missing(node, key) else node[key]
        except OmegaConfBaseException:
            # Nothing could be made of it either.
            continue
        if key in _CALLED:
            yield str(value)
        elif isinstance(value, dict | list):
            # As a resolver gives it.
            yield from _called(OmegaConf.create(value))
        elif OmegaConf.is_config(value):
            yield from _called(value)


def check_values(config: Config, built_in: Path, user: Path | None) -> None:
    """Check what stands between groups.

    Args:
        config: the whole configuration.
        built_in: folder of the built-in files; they tell which keys of `model.training` are read.
        user: folder of the user's own, if there is one.

    Raises:
        ConfigError: every problem found, at most 20.
    """
    found = [
        *_names(config),
        *_empty_paths(config),
        *_training(config, [built_in, user]),
        *_mixes(config, built_in),
        *_secrets(config),
    ]
    if found:
        raise ConfigError(several(found))


def _secret(key: str) -> str:
    return f"{key}: looks like a secret; put it in the environment (HF_TOKEN, WANDB_API_KEY), remove it here"


def _secrets(config: Config) -> Iterator[str]:
    texts = {key: value for key, value in _leaves(asdict(config), "") if isinstance(value, str)}
    if holds_secret("\n".join(texts.values())):
        yield from (_secret(key) for key, value in texts.items() if holds_secret(value))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def named_stages(config: Config) -> dict[str, StageConfig]:
    """Where each stage stands in the configuration -> the stage."""
    alone = {"stage": config.stage} if config.stage is not None else {}
    return alone | {f"stages.{name}": stage for name, stage in config.stages.items()}


def _names(config: Config) -> Iterator[str]:
    for key, name in (("run.name", config.run.name), ("sweep.name", config.sweep.name)):
        if name is not None and (not _RUN_NAME.fullmatch(name) or _DEVICE_NAMES.fullmatch(name)):
            shown = name if len(name) <= 40 else f"{name[:40]}..."
            yield f"{key}: {shown!r} is no folder name; use letters, digits, . _ -, a letter or digit first"
    if not config.output_dir.strip():
        yield "output_dir: is empty; name a folder, for example outputs"
    for tracker in config.trackers:
        if tracker not in TRACKERS:
            yield f"trackers: there is no {tracker!r}. {did_you_mean(tracker, TRACKERS)}"
    for stage in config.stages:
        if not _RUN_NAME.fullmatch(stage) or stage in (BASE, LATEST, NEWEST):
            yield f"stages.{stage}: {stage!r} names no stage; use letters, digits, . _ -, not base, latest, newest"


def _empty_paths(config: Config) -> Iterator[str]:
    if not config.model.path.strip():
        yield "model.path: is empty; write model=FOLDER, model=OWNER/NAME or model=tiny"
    if any(not stage.data.path.strip() for stage in named_stages(config).values()):
        yield "data.path: is empty; write data=./my.jsonl, data=OWNER/NAME or data=toy"


def _training(config: Config, folders: list[Path | None]) -> Iterator[str]:
    read = {
        (kind, key)
        for folder in folders
        if folder is not None
        for path in folder.rglob("*.yaml")
        for kind, key in _READS.findall(path.read_text(encoding="utf-8", errors="replace"))
    }
    for kind, values in config.model.training.items():
        at = f"model.training.{kind}"
        if kind not in KINDS:
            yield f"{at}: there is no kind of stage {kind!r}. {did_you_mean(kind, KINDS)}"
            continue
        known = [spec.name for spec in fields(KINDS[kind])]
        for key in values or {}:
            if (kind, key) in read:
                continue
            if key not in known:
                yield f"there is no key '{at}.{key}'. {did_you_mean(key, known)}"
            else:
                yield f"{at}.{key}: no stage reads it; set stages.NAME.{key} or stage.{key} instead"


def _mixes(config: Config, built_in: Path) -> Iterator[str]:
    prefix = "world.mix."
    lines = key_lines(built_in / "data" / "toy.yaml")
    known = [line.key.removeprefix(prefix) for line in lines if line.key.startswith(prefix)]
    stages = named_stages(config).items()
    for at, section in [("data", config.data), *((f"{at}.data", stage.data) for at, stage in stages)]:
        for kind in section.world.mix:
            if kind not in known:
                yield f"there is no key '{at}.{prefix}{kind}'. {did_you_mean(kind, known)}"
                return
