"""Whether a configuration holds what was typed."""

from omegaconf import DictConfig, OmegaConf

from alignpipe.compose.composition import Composed
from alignpipe.compose.words import parse

# What tells one option of a group from another.
MARKS = ("kind", "name", "action", "path")


def unsaid(composed: Composed, words: list[str]) -> list[str]:
    """Those of the words that cannot be found in what they were composed to."""
    whole = OmegaConf.create(composed.yaml)
    experiment = f"experiment={composed.choices['experiment']}"
    return [word for word in words if word != experiment and not _holds(whole, *word.split("=", 1))]


def _holds(whole: DictConfig, key: str, typed: str) -> bool:
    override = parse(f"{key}={typed}")
    value = typed if override is None else override.value()
    found = OmegaConf.select(whole, key)
    marks = [found.get(mark) for mark in MARKS] if isinstance(found, DictConfig) else []
    return value == found or value in marks
