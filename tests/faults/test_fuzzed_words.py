"""Every key of the schema with a wrong type, out of its bounds, and misspelt by one letter: each is one line."""

import math
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

import pytest

from alignpipe.compose import compose
from alignpipe.config import KINDS, Config, DataConfig
from alignpipe.errors import ConfigError
from tests.faults.table import Faults

# Misspelt keys of which the right one must come first.
RIGHT = 0.95
REWARDED = ("rs", "ppo")


@dataclass(frozen=True)
class Key:
    """A key of the schema.

    Attributes:
        words: under which it is there.
        name: dotted.
        kind: its type.
        rule: its bounds or options.
    """

    words: tuple[str, ...]
    name: str
    kind: Any
    rule: dict[str, Any] = field(default_factory=dict, hash=False)


def _keys(schema: type, words: tuple[str, ...], above: str = "") -> Iterator[Key]:
    """Every key that holds a value, not a section; data of a stage is that of the root."""
    kinds = get_type_hints(schema)
    for spec in fields(schema):
        kind = kinds[spec.name]
        if is_dataclass(kind) and not (above and kind is DataConfig):
            yield from _keys(kind, words, f"{above}{spec.name}.")  # type: ignore[arg-type]
        elif not is_dataclass(kind) and spec.name not in ("stage", "stages", "pipeline"):
            yield Key(words, above + spec.name, kind, dict(spec.metadata))


def _all_keys() -> list[Key]:
    found = list(_keys(Config, ("stage=sft",)))
    for name, kind in KINDS.items():
        words = (f"stage={name}", *(["stage.reward_model=rm"] if name in REWARDED else []))
        found += _keys(kind, words, "stage.")
    return found


KEYS = _all_keys()


def _wrong_type(key: Key) -> str | None:
    """A value of another type; None where any is taken."""
    kind = str(key.kind)
    if "Any" in kind or key.kind is type(None):
        return None
    if "list" in kind or "dict" in kind:
        return "5"
    if "int" in kind or "float" in kind:
        return "fast"
    return "maybe" if "bool" in kind else "[1,2]"


def _out_of_bounds(key: Key) -> str | None:
    """A value that the rule of a key refuses; None where it has none."""
    if "options" in key.rule:
        return "nosuchword"
    for bound, step in (("above", 0), ("min", -1), ("max", 1)):
        if key.rule.get(bound) is not None:
            return str(key.rule[bound] + step)
    return "nan" if "float" in str(key.kind) and "dict" not in str(key.kind) else None


def _slip(name: str, rng: random.Random) -> str:
    """The last part of a key with a letter too many, too few, another, or two in the wrong order."""
    above, dot, word = name.rpartition(".")
    at, letter = rng.randrange(len(word)), rng.choice(string.ascii_lowercase)
    slips = {
        word[:at] + letter + word[at:],
        word[:at] + letter + word[at + 1 :],
        word[:at] + word[at + 1 :],
        word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
    }
    known = {key.name for key in KEYS}
    fit = sorted(slip for slip in slips if len(slip) > 1 and f"{above}{dot}{slip}" not in known)
    return f"{above}{dot}{rng.choice(fit)}"


def _line(key: Key, word: str) -> str:
    """The line that a word is refused with."""
    with pytest.raises(ConfigError) as refused:
        compose([*key.words, word])
    line = str(refused.value)
    assert "\n" not in line
    return line


@pytest.mark.parametrize("wrong", [_wrong_type, _out_of_bounds])
def test_wrong_value_of_any_key_names_the_key(
    wrong: Callable[[Key], str | None], count: Callable[[int, int], int], faults: Faults
) -> None:
    cases = [(key, value) for key in KEYS if (value := wrong(key)) is not None]
    tried = random.Random(0).sample(cases, count(12, len(cases)))
    silent = [
        (key.name, value, line)
        for key, value in tried
        if key.name.removeprefix("stage.") not in (line := _line(key, f"{key.name}={value}"))
    ]
    assert not silent
    faults.tell("configuration: a wrong value of a key names it", len(tried), len(tried))


def test_misspelt_key_gets_the_right_one(count: Callable[[int, int], int], faults: Faults) -> None:
    rng = random.Random(0)
    tried = rng.sample(KEYS, count(12, len(KEYS)))
    missed = []
    for key in tried:
        slipped = _slip(key.name, rng)
        line = _line(key, f"{slipped}=1")
        if f"Did you mean {key.name}" not in line:
            missed.append((slipped, line))
    needed = math.ceil(RIGHT * len(tried))
    right = len(tried) - len(missed)
    assert right >= needed, missed
    faults.tell(
        f"configuration: a key misspelt by a letter is named, {RIGHT:.0%} at least",
        right,
        len(tried),
        least=needed,
    )
