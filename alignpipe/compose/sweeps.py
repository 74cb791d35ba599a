"""A command line with -m -> its jobs, each composed and checked before the first one starts."""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import DictConfig, open_dict, read_write

from alignpipe.compose.command_line import Line
from alignpipe.compose.composition import Composed, compose_words, composing, explained, prepare
from alignpipe.compose.words import quote
from alignpipe.config import Config
from alignpipe.errors import ConfigError
from alignpipe.objective import check_searchable, is_low_best

# How jobs are run, compared and filed away, not what they are.
_RANKS = re.compile(r"\+?(hydra|objective|sweep\.name=)")


@dataclass(frozen=True)
class Sweep:
    """Several runs from one command line.

    Attributes:
        words: as Hydra takes them.
        jobs_words: those of them that decide what the jobs are.
        folder: of the sweep.
        config: of the first job; what all jobs share can be read from it.
        jobs: composed and checked; empty when a sweeper of Hydra's picks values while it runs.
        by_hydra: another launcher or sweeper than the plain one was chosen.
    """

    words: list[str]
    jobs_words: list[str]
    folder: Path
    config: Config
    jobs: list[Composed]
    by_hydra: bool


def compose_sweep(line: Line) -> Sweep:
    """Compose and check every job of a sweep before the first one starts.

    Of a sweeper that picks values while it runs, the ends of every interval and each choice are checked.

    Raises:
        AlignpipeError: as `compose`, for any job.
        ConfigError: also for jobs that share a run.name, and a search without a figure to search by.
    """
    with composing(line):
        words = prepare(line)
        chosen = {word.lstrip("+").partition("=")[0]: word.partition("=")[2] for word in words}
        searches = chosen.get("hydra/sweeper", "basic") != "basic"
        with explained(words):
            parsed = _parse(words)
            raw = _raw([_word(item, next(_values(item))) for item in parsed], line)
            params = raw.hydra.sweeper.get("params") or {}
            parsed = [*_parse([f"{key}={value}" for key, value in params.items()]), *parsed]
            tried = _probes(parsed) if searches else _combinations(parsed)
        jobs = [compose_words(job, line.config_name) for job in tried]
        _check_run_names(jobs)
        config = jobs[0].config
        if searches:
            check_searchable(config, chosen["hydra/sweeper"])
            words += _search_words(config, raw, chosen)
        jobs_words = [word for word in words if not _RANKS.match(word)]
        name = config.sweep.name or _name(config, jobs_words)
        with open_dict(raw), read_write(raw):
            raw.sweep.name = name
        folder = str(raw.hydra.sweep.dir)
        words.append(f"hydra.sweep.dir={quote(folder)}")
        by_hydra = searches or chosen.get("hydra/launcher", "basic") != "basic"
        return Sweep(words, jobs_words, Path(folder), config, [] if searches else jobs, by_hydra)


def _parse(words: list[str]) -> list[Override]:
    return list(OverridesParser.create(GlobalHydra.instance().config_loader()).parse_overrides(words))


def _raw(words: list[str], line: Line) -> DictConfig:
    return hydra.compose(line.config_name, words, return_hydra_config=True)


def _word(override: Override, value: str | None) -> str:
    key = str(override.get_key_element())
    return key if value is None else f"{key}={value}"


def _values(override: Override) -> Iterator[str | None]:
    """Values to check a word with: all of a choice or range, the ends of an interval, the one of a plain word."""
    value = override.value()
    if not override.is_sweep_override():
        yield None if "=" not in str(override.input_line) else override.get_value_element_as_str()
    elif isinstance(value, IntervalSweep):
        yield from (str(value.start), str(value.end))
    else:
        yield from override.sweep_string_iterator()


def _combinations(parsed: list[Override]) -> list[list[str]]:
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return [list(job) for job in jobs]


def _probes(parsed: list[Override]) -> list[list[str]]:
    """Every value of each word once, the other words at their first."""
    values = {str(item.get_key_element()): [_word(item, value) for value in _values(item)] for item in parsed}
    first = {key: found[0] for key, found in values.items()}
    others = [{**first, key: word} for key, found in values.items() for word in found[1:]]
    return [list(job.values()) for job in (first, *others)]


def _check_run_names(jobs: list[Composed]) -> None:
    names = [job.config.run.name for job in jobs if job.config.run.name is not None]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"run.name: {names[0]} would be the name of {len(names)} runs; name the sweep with sweep.name={names[0]}, "
            "or let the names differ: run.name='kl-${stages.ppo.kl_coef}'"
        )


def _search_words(config: Config, raw: DictConfig, chosen: dict[str, str]) -> list[str]:
    """What a search needs and Hydra sets otherwise: the direction, and a seed so that the same words search alike."""
    sweeper: Any = raw.hydra.sweeper
    found = {}
    if "direction" in sweeper:
        found["hydra.sweeper.direction"] = "minimize" if is_low_best(config) else "maximize"
    if "sampler" in sweeper and "seed" in sweeper.sampler and sweeper.sampler.seed is None:
        found["hydra.sweeper.sampler.seed"] = str(config.seed)
    direction = chosen.get("hydra.sweeper.direction")
    if direction not in (None, found.get("hydra.sweeper.direction")):
        raise ConfigError(
            f"hydra.sweeper.direction={direction}: the objective has its direction already; "
            f"say objective_direction={direction} instead"
        )
    return [f"{key}={value}" for key, value in found.items() if key not in chosen]


def _name(config: Config, words: list[str]) -> str:
    """Begins like the names of runs; the same words make the same name."""
    start = config.stage.kind if config.stage is not None else getattr(config.pipeline, "name", "sweep")
    return f"{start}-{hashlib.sha256(chr(0).join(words).encode()).hexdigest()[:8]}"
