"""Rounds: the stages that `pipeline.round` lists are repeated `pipeline.rounds` times (arXiv:2307.09288, section 3.2).

Config with stages collect, rm, rs -> Config with collect_1, rm_1, rs_1, collect_2, ...

Hydra cannot loop, so the copies are made of what it composed, when every value is typed and every interpolation is
resolved. Up to there (words, sweeps, `--cfg job`, the recorded YAML) a repeated stage stands once, and `stages.rs.KEY`
changes it in all rounds; from there on (`config show`, `plan`, keys, names in errors) there are only the copies.
`stages.rs_3.KEY=VALUE` is rewritten to `pipeline.round_overrides.3.rs.KEY` before Hydra, which knows no rs_3, reads it.

Names in a repeated stage, and in the stages after the rounds:

* NAME of a repeated stage is its newest copy made before; in a list it is all copies made before, oldest first.
* `newest` is the newest policy made before; in a list it is the last policy of each round.
* Where nothing was made before, a policy is `pipeline.start`, another input null if the key allows it; a list has none.

The seed of round k is the stage's own plus 1000 (k - 1): the same prompts are asked with other random numbers.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

from omegaconf import OmegaConf

from alignpipe.artifact import POLICY_KINDS
from alignpipe.compose.explain import unknown_key
from alignpipe.config import NEWEST, Config, PipelineConfig, StageConfig
from alignpipe.errors import ConfigError, did_you_mean

# Far enough apart that the seeds of a sweep, 0, 1, 2, do not meet those of rounds.
SEED_STEP = 1000
# The input that a first round does without: the rankings of the rounds before.
PREVIOUS = "previous"
_OVERRIDES = "pipeline.round_overrides"
_NUMBERED = re.compile(r"\+{0,2}stages\.([^.=@]+)_([1-9]\d*)\.([^=]+=.*)", re.DOTALL)


@dataclass(frozen=True)
class _Copy:
    """One stage in one round."""

    stage: str
    round: int
    kind: str

    @property
    def name(self) -> str:
        return f"{self.stage}_{self.round}"


def rewrite_rounds(words: list[str], repeated: Callable[[], list[str]]) -> list[str]:
    """Turn words about one round into keys that Hydra knows.

    Args:
        words: as Hydra takes them otherwise.
        repeated: names of the stages that the pipeline repeats; asked only where a word may be about one.
    """
    found = [_NUMBERED.fullmatch(word) for word in words]
    names = repeated() if any(found) else []
    rewritten = []
    for word, match in zip(words, found, strict=True):
        if match is not None and match[1] in names:
            rewritten.append(f"++{_OVERRIDES}.{match[2]}.{match[1]}.{match[3]}")
        else:
            rewritten.append(word)
    return rewritten


def unroll(config: Config) -> Config:
    """Repeat the stages of a round; a configuration without one comes back as it is.

    Raises:
        ConfigError: the round, or what is to differ in one of them, names what is not there.
        OmegaConfBaseException: a value that differs is of the wrong type.
    """
    pipeline = config.pipeline
    if pipeline is None or config.stage is not None:
        return config
    if not pipeline.round:
        if pipeline.rounds > 1 or pipeline.round_overrides or pipeline.from_round:
            raise ConfigError(
                "pipeline.round: is empty, so there is nothing to repeat; list the stages of a round, or take "
                "pipeline=llama2_rounds"
            )
        return config
    order = _unrolled_order(pipeline, config.stages)
    overrides = _overrides(pipeline)
    copies = _copies(pipeline, config.stages)
    kinds = {name: config.stages[name].kind for name in pipeline.round}
    stages: dict[str, StageConfig] = {}
    for name, stage in config.stages.items():
        if name not in pipeline.round:
            after = name not in pipeline.order or _is_after(name, pipeline)
            names = _Names(pipeline.start, kinds, copies if after else [])
            stages[name] = names.resolved(stage, f"stages.{name}")
        elif not any(copy.name in stages for copy in copies):
            for index, copy in enumerate(copies):
                own = config.stages[copy.stage]
                own = replace(own, seed=(own.seed + SEED_STEP * (copy.round - 1)) % 2**32)
                own = _overridden(own, copy.name, overrides.get(copy.round, {}).get(copy.stage, {}))
                names = _Names(pipeline.start, kinds, copies[:index])
                stages[copy.name] = names.resolved(own, f"stages.{copy.name}")
    gates = {
        each: section
        for name, section in config.gates.items()
        for each in ([copy.name for copy in copies if copy.stage == name] or [name])
    }
    return replace(config, stages=stages, pipeline=replace(pipeline, order=order), gates=gates)


def _copies(pipeline: PipelineConfig, stages: Mapping[str, StageConfig]) -> list[_Copy]:
    return [
        _Copy(name, number, stages[name].kind)
        for number in range(1, pipeline.rounds + 1)
        for name in pipeline.round
        if number >= pipeline.from_round.get(name, 1)
    ]


def _unrolled_order(pipeline: PipelineConfig, stages: Mapping[str, StageConfig]) -> list[str]:
    """The order with all rounds in the place of one; an order that names copies is left as it is."""
    for name in pipeline.round:
        if name not in stages:
            raise ConfigError(f"pipeline.round: there is no stage {name!r}. {did_you_mean(name, stages)}")
        if pipeline.round.count(name) > 1:
            raise ConfigError(f"pipeline.round: {name} stands in it twice")
    for name in pipeline.from_round:
        if name not in pipeline.round:
            raise ConfigError(
                f"pipeline.from_round: {name!r} is no stage of pipeline.round. "
                f"{did_you_mean(name, pipeline.round)}"
            )
    copies = [copy.name for copy in _copies(pipeline, stages)]
    taken = next((name for name in copies if name in stages), None)
    if taken is not None:
        raise ConfigError(f"stages.{taken}: rounds make a stage of that name; call this one otherwise")
    inside = [name for name in pipeline.order if name in pipeline.round]
    if not inside:
        return list(pipeline.order)
    first = pipeline.order.index(inside[0])
    if pipeline.order[first : first + len(pipeline.round)] != pipeline.round:
        raise ConfigError(
            f"pipeline.round: {', '.join(pipeline.round)} must stand side by side in pipeline.order, which is "
            f"{', '.join(pipeline.order)}; to run a part, name its rounds: pipeline.order=[{inside[0]}_1]"
        )
    return [*pipeline.order[:first], *copies, *pipeline.order[first + len(pipeline.round) :]]


def _is_after(name: str, pipeline: PipelineConfig) -> bool:
    inside = [pipeline.order.index(stage) for stage in pipeline.round if stage in pipeline.order]
    return not inside or pipeline.order.index(name) > min(inside)


def _overrides(pipeline: PipelineConfig) -> dict[int, dict[str, dict[str, Any]]]:
    """Round -> stage -> keys, every one of them there."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for number, stages in pipeline.round_overrides.items():
        if not str(number).isdecimal() or not 1 <= int(number) <= pipeline.rounds:
            raise ConfigError(
                f"{_OVERRIDES}: there is no round {number!r}; pipeline.rounds makes 1 to {pipeline.rounds}"
            )
        for name, values in _section(stages, f"{_OVERRIDES}.{number}", "stages").items():
            if name not in pipeline.round:
                raise ConfigError(
                    f"{_OVERRIDES}.{number}: {name!r} is no stage of pipeline.round. "
                    f"{did_you_mean(name, pipeline.round)}"
                )
            if int(number) < pipeline.from_round.get(name, 1):
                raise ConfigError(
                    f"{_OVERRIDES}.{number}: {name} takes part from round {pipeline.from_round[name]} on "
                    f"(pipeline.from_round)"
                )
            keys = _section(values, f"{_OVERRIDES}.{number}.{name}", "keys")
            own = found.setdefault(int(number), {})
            # A number from YAML and one from a word are two keys of the table.
            own[name] = _merged(own.get(name, {}), keys)
    return found


def _section(value: Any, key: str, of: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{key}: expected a section of {of}, got {value!r}")
    return value


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    merged: Any = OmegaConf.to_container(OmegaConf.merge(first, second))
    return dict(merged)


def _overridden(stage: StageConfig, name: str, values: dict[str, Any]) -> StageConfig:
    """The stage with some keys changed, held against its schema."""
    if not values:
        return stage
    known = {"stages": {name: asdict(stage)}}
    foreign = next(_foreign(values, known["stages"][name], f"stages.{name}"), None)
    if foreign is not None:
        raise ConfigError(unknown_key(foreign, known))
    if values.get("kind", stage.kind) != stage.kind:
        raise ConfigError(f"stages.{name}.kind: every round of a stage is of one kind, {stage.kind}")
    # In its place in a tree, so that an error names the whole key.
    tree = OmegaConf.create({"stages": {}})
    tree.stages[name] = OmegaConf.structured(stage)
    OmegaConf.update(tree, f"stages.{name}", values, merge=True)
    changed: Any = OmegaConf.to_object(tree.stages[name])
    assert isinstance(changed, StageConfig)
    return changed


def _foreign(values: dict[str, Any], known: dict[str, Any], above: str) -> Iterator[str]:
    for key, value in values.items():
        if key not in known:
            yield f"{above}.{key}"
        elif isinstance(value, dict) and isinstance(known[key], dict):
            yield from _foreign(value, known[key], f"{above}.{key}")


@dataclass(frozen=True)
class _Names:
    """What the names in a stage mean.

    Attributes:
        start: policy before the first round.
        kinds: of the stages that are repeated, by name.
        made: copies before the stage.
    """

    start: str
    kinds: dict[str, str]
    made: list[_Copy]

    def resolved(self, section: Any, key: str) -> Any:
        """A stage, or a section of one, with every name of an input replaced by what it means."""
        changes: dict[str, Any] = {}
        for spec in fields(section):
            value, at = getattr(section, spec.name), f"{key}.{spec.name}"
            if is_dataclass(value):
                changes[spec.name] = self.resolved(value, at)
            elif not spec.metadata.get("in_key", True) or spec.metadata.get("names"):
                # Names of inputs are in no key: what they stand for is.
                changes[spec.name] = self._meant(value, at, optional=spec.name == PREVIOUS)
        return replace(section, **changes)

    def _meant(self, value: Any, key: str, *, optional: bool) -> Any:
        if isinstance(value, dict):
            return {self._meant(name, f"{key}.{name}", optional=False): item for name, item in value.items()}
        if isinstance(value, list):
            several = [meant for item in value for meant in self._several(item)]
            return [meant for place, meant in enumerate(several) if meant not in several[:place]]
        if found := self._several(value):
            return found[-1]
        if value == NEWEST or self.kinds[value] in POLICY_KINDS:
            return self.start
        if optional:
            return None
        raise ConfigError(
            f"{key}: no {value} runs before it in round 1; put {value} before it in pipeline.round, or name one that "
            f"is there already"
        )

    def _several(self, value: Any) -> list[Any]:
        """All that a name stands for, the newest last; any other value is itself."""
        if value == NEWEST:
            policies = {copy.round: copy.name for copy in self.made if copy.kind in POLICY_KINDS}
            return list(policies.values())
        if not isinstance(value, str) or value not in self.kinds:
            return [value]
        return [copy.name for copy in self.made if copy.stage == value]
