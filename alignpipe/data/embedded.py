"""Records of the embedded world: its configuration -> prompts, demonstrations, rankings, documents.

Rankings are of demonstrations of mixed quality, so that a reward model or DPO can be tried without a collect
stage.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from alignpipe.config import DataConfig, LabelersConfig, WorldConfig
from alignpipe.data.records import Demonstration, Message, Prompt, Ranking, Record, RecordType, Text
from alignpipe.errors import ConfigError, did_you_mean
from alignpipe.toy import world
from alignpipe.toy.answers import demonstrate, make_demonstrations, make_documents
from alignpipe.toy.judge import judge
from alignpipe.toy.labelers import Bias, Guideline, merge_rankings, rank_responses

# Responses that are ranked for each prompt.
NUM_RESPONSES = 4
# A prompt whose answers are always the same would be drawn for ever.
_MAX_DRAWS = 32


def world_hash() -> str:
    """Returns a sha256 of the code that makes the world, since that is what its records come from."""
    digest = hashlib.sha256()
    for path in sorted(Path(world.__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def read_world(config: DataConfig, want: RecordType) -> list[Record]:
    """Makes the records of one type; the same configuration gives the same records.

    Raises:
        ConfigError: The world has not as many prompts, or no such kind of prompt.
    """
    settings = config.world
    size = settings.num_prompts if config.max_rows is None else min(settings.num_prompts, config.max_rows)
    if want == "text":
        return [Text(text) for text in make_documents(size, settings.seed)]
    prompts = _prompts(settings)[:size]
    if want == "prompts":
        return [Prompt((Message("user", prompt),)) for prompt in prompts]
    if want == "demonstrations":
        count = size * settings.num_demonstrations
        return list(_demonstrations(tuple(prompts), count, settings.seed, settings.quality))
    return list(
        _rankings(tuple(prompts), settings.seed, settings.quality, *labeler_settings(config.labelers))
    )


def _prompts(settings: WorldConfig) -> list[str]:
    unknown = [kind for kind in settings.mix if kind not in world.KINDS]
    if unknown:
        raise ConfigError(
            f"data.world.mix.{unknown[0]}: there is no such kind of prompt. "
            f"{did_you_mean(unknown[0], world.KINDS)}"
        )
    mix: Mapping[str, float] = {**world.DEFAULT_MIX, **settings.mix}
    try:
        return world.make_prompts(settings.num_prompts, settings.seed, mix)
    except ValueError as error:
        raise ConfigError(f"{error}; lower data.world.num_prompts or change data.world.mix") from error


def labeler_settings(settings: LabelersConfig) -> tuple[int, float, float, Bias, Guideline]:
    """Number of labelers, noise, tie margin, bias and guideline, as the world takes them."""
    bias, guideline = settings.bias, settings.guideline
    return (
        settings.num_labelers,
        settings.noise,
        settings.tie_margin,
        Bias(bias.length, bias.flattery, bias.confidence, bias.subjectivity),
        Guideline(guideline.helpful, guideline.truthful, guideline.harmless),
    )


# Every stage of a run reads its rows, most of them twice: to learn and to hold out.
@lru_cache(maxsize=2)
def _demonstrations(
    prompts: tuple[str, ...], count: int, seed: int, quality: float
) -> tuple[Demonstration, ...]:
    pairs = make_demonstrations(count, seed, quality=quality, prompts=prompts)
    return tuple(Demonstration((Message("user", asked), Message("assistant", said))) for asked, said in pairs)


# Judging takes milliseconds a prompt.
@lru_cache(maxsize=2)
def _rankings(
    prompts: tuple[str, ...],
    seed: int,
    quality: float,
    num_labelers: int,
    noise: float,
    tie_margin: float,
    bias: Bias,
    guideline: Guideline,
) -> tuple[Ranking, ...]:
    rankings = []
    for prompt in prompts:
        drawn = (demonstrate(prompt, seed, index, quality) for index in range(_MAX_DRAWS))
        responses = tuple(itertools.islice(_distinct(drawn), NUM_RESPONSES))
        if len(responses) < 2:
            continue
        ranks = rank_responses(
            prompt,
            responses,
            num_labelers=num_labelers,
            noise=noise,
            bias=bias,
            guideline=guideline,
            tie_margin=tie_margin,
            seed=seed,
        )
        merged = tuple(float(rank) for rank in merge_rankings(ranks))
        gold = tuple(judge(prompt, response).overall for response in responses)
        rankings.append(Ranking((Message("user", prompt),), responses, merged, gold))
    return tuple(rankings)


def _distinct(texts: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for text in texts:
        if text not in seen:
            seen.add(text)
            yield text
