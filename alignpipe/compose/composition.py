"""Words on the command line -> one checked configuration.

Hydra composes; the result is then held against the typed schema once more, since Hydra itself lets
`+key=value` pass by it, and turned into dataclasses. Whatever is wrong comes out as one ConfigError line.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from alignpipe.checks import problems
from alignpipe.compose import explain, rounds, words, yaml_files
from alignpipe.compose.command_line import CONFIG_NAME, Line, read_line
from alignpipe.compose.guards import check_hydra, check_values, check_words
from alignpipe.compose.strict import check_keys, own_problems
from alignpipe.config import Config, register
from alignpipe.errors import ConfigError, several
from alignpipe.gates import find_gates
from alignpipe.objective import check_objective
from alignpipe.secrets import hide_secrets

TASK_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, AssertionError, RecursionError)


@dataclass(frozen=True)
class Composed:
    """A configuration that passed every check that needs no data and no model.

    Attributes:
        config: the values, rounds unrolled.
        yaml: the same before interpolations are resolved, so that no environment variable stands in it, and before
            rounds are unrolled, so that every word still reaches all of them.
        overrides: the words as Hydra was given them.
        choices: group (`stage@stages.rm`) -> option.
    """

    config: Config
    yaml: str
    overrides: list[str]
    choices: dict[str, str]

    @property
    def resolved_yaml(self) -> str:
        """All values, interpolations replaced."""
        return OmegaConf.to_yaml(OmegaConf.create(asdict(self.config)))


def built_in_folder() -> Path:
    """conf/ inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


class CheckedSource(FileConfigSource):
    """A folder of YAML files of the user's, each looked at before Hydra parses it."""

    @staticmethod
    def scheme() -> str:
        """What the path of such a folder begins with."""
        return "checked"

    def load_config(self, config_path: str) -> ConfigResult:
        """Read one file.

        Raises:
            ConfigError: it is broken, or names code.
        """
        path = Path(self.path, self._normalize_file_name(config_path))
        if path.is_file():
            yaml_files.check_file(path)
        return super().load_config(config_path)


class UserFolder(SearchPathPlugin):
    """Puts the user's folder before the built-in one; Hydra's own --config-dir comes after it and loses."""

    folder: Path | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Insert the folder, if there is one."""
        if UserFolder.folder is not None:
            search_path.prepend("user", f"{CheckedSource.scheme()}://{UserFolder.folder}", anchor="main")


def setup(folder: Path | None) -> None:
    """Make schema and search path known to Hydra.

    Raises:
        ConfigError: a file of the folder is broken.
    """
    register()
    UserFolder.folder = folder
    Plugins.instance().register(CheckedSource)
    Plugins.instance().register(UserFolder)
    if folder is not None:
        for path in user_files():
            yaml_files.check_file(path)


def user_files() -> list[Path]:
    """YAML files of the user's folder, if one is in use."""
    return yaml_files.yaml_files(UserFolder.folder, groups()) if UserFolder.folder else []


def groups() -> list[str]:
    """Names of the groups that conf/ holds."""
    return sorted(path.name for path in built_in_folder().iterdir() if path.is_dir())


@contextmanager
def composing(line: Line) -> Iterator[None]:
    """Hydra over the built-in folder and the user's own.

    Raises:
        ConfigError: a file of the user's folder is broken.
    """
    setup(line.folder)
    with _session():
        yield


@contextmanager
def _session() -> Iterator[None]:
    """Hydra over our folder; inside a job of a sweep it is under way already, and cannot be nested."""
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        with hydra.initialize_config_dir(str(built_in_folder()), version_base="1.3", job_name="alignpipe"):
            yield


def group_options(group: str) -> list[str]:
    """Names of the options of a group, the user's own among them; only inside a composition."""
    return list(GlobalHydra.instance().config_loader().get_group_options(group))


def prepare(line: Line) -> list[str]:
    """The words as Hydra takes them; only inside a composition.

    Raises:
        AlignpipeError: as `words.rewrite`; also `stage=` beside `pipeline=`, or a secret in a word.
    """
    check_words(line.words)
    rewritten = words.rewrite(line.words, group_options, multirun=line.multirun)
    for word in rewritten:
        if words.parse(word) is None:
            mend = "write key=value, and quote a value with spaces or signs: \"key='a b'\""
            raise ConfigError(f"{word!r} cannot be read; {mend}")
    keys = {word.partition("=")[0]: word.partition("=")[2] for word in rewritten}
    if keys.get("stage", "null") != "null":
        if "pipeline" in keys:
            raise ConfigError(
                f"stage={keys['stage']} and pipeline={keys['pipeline']} exclude each other; leave one out "
                "(pipeline.order=[...] runs a part of a pipeline)"
            )
        if "~pipeline" not in keys:
            rewritten.append("~pipeline")
    return rounds.rewrite_rounds(rewritten, lambda: _repeated(rewritten, line.config_name))


def _repeated(overrides: list[str], config_name: str) -> list[str]:
    """Names of the stages that the pipeline of some words repeats; none where they do not compose."""
    chosen = [word for word in overrides if re.match(r"(pipeline|pipeline\.round|experiment)=", word)]
    try:
        with _session():
            raw = hydra.compose(config_name, chosen)
    except TASK_ERRORS:
        return []
    return [] if raw.get("pipeline") is None else list(raw.pipeline.round)


def compose(argv: list[str]) -> Composed:
    """Compose and check one run's configuration.

    Args:
        argv: words and flags after `alignpipe run` or `alignpipe plan`.

    Raises:
        ConfigError: anything that is wrong in words, files or values.
        DataError: `data=` names a file that is not there.
        CheckpointError: `model=` names a folder that is not there.
    """
    line = read_line(argv)
    if line.multirun:
        raise ConfigError("-m makes several runs; leave it and the commas out, or use it with alignpipe run")
    with composing(line):
        return compose_words(prepare(line), line.config_name)


def compose_words(overrides: list[str], config_name: str) -> Composed:
    """Compose and check words that are prepared; only inside a composition.

    Raises:
        ConfigError: as `compose`.
    """
    with explained(overrides):
        raw = hydra.compose(config_name, overrides, return_hydra_config=True)
        check_hydra(raw.hydra)
        choices = {str(group): str(option) for group, option in raw.hydra.runtime.choices.items()}
        return checked(raw, overrides, choices)


def prepared_words(line: Line) -> list[str]:
    """The words for Hydra's own front, without composing."""
    with composing(line):
        return prepare(line)


@contextmanager
def explained(overrides: list[str]) -> Iterator[None]:
    """Turn what Hydra and OmegaConf raise into one ConfigError line."""
    try:
        yield
    except TASK_ERRORS as error:
        line = explain.one_line(error, overrides, _key_tree(overrides), user_files())
        raise ConfigError(hide_secrets(line).strip()) from error


def _key_tree(overrides: list[str]) -> Callable[[], dict[str, Any]]:
    """Every key that could have been meant: the composition without the user's values."""

    def compose_tree() -> dict[str, Any]:
        chosen = [word for word in overrides if re.match(r"(~?(stage|pipeline)|\+?stage@[^=]+)(=|$)", word)]
        for attempt in (chosen, []):
            try:
                with _session():
                    raw = hydra.compose(CONFIG_NAME, attempt)
                tree: Any = OmegaConf.to_container(raw)
                return {**dict.fromkeys(groups()), **tree}
            except TASK_ERRORS:
                continue
        return {}

    return compose_tree


def checked(raw: DictConfig, overrides: list[str], choices: dict[str, str]) -> Composed:
    """Hold a composition against the schema once more, and turn it into dataclasses.

    Raises:
        ConfigError: a key that the schema lacks, a value out of its bounds, a section that is missing.
        OmegaConfBaseException: a value without an interpolation's target, or that is missing.
    """
    with open_dict(raw), read_write(raw):
        if "hydra" in raw:
            del raw["hydra"]
    if OmegaConf.get_type(raw) is not Config:
        raise ConfigError(
            "the first file composed must begin with `defaults: [schema/config@_here_, ..., _self_]`"
        )
    check_keys(raw, overrides, groups())
    # From here on `oc.select` may look for a key that is not there.
    OmegaConf.set_struct(raw, False)
    config: Any = OmegaConf.to_object(raw)
    # Once as the user wrote it, so that a bad value is named once, and once with what single rounds change in it.
    _check_whole(config)
    unrolled = rounds.unroll(config)
    if unrolled is not config:
        _check_whole(unrolled)
    check_objective(unrolled)
    find_gates(unrolled)
    return Composed(unrolled, OmegaConf.to_yaml(raw), overrides, choices)


def _check_whole(config: Config) -> None:
    if config.stage is None and config.pipeline is None:
        raise ConfigError(
            "there is nothing to run: name a stage (stage=sft) or a pipeline (pipeline=llama2_style)"
        )
    check_values(config, built_in_folder(), UserFolder.folder)
    found = list(own_problems(problems(config)))
    if found:
        raise ConfigError(several(found))
