"""The embedded world: task kinds and their prompts. Seed -> prompts; prompt text -> task.

All of it is built from finite tables, so a prompt is looked up rather than parsed: two texts never mean two
tasks.
"""

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from alignpipe.toy import lexicon

GROUPS = lexicon.GROUPS

# Kind of prompt -> its weight in a draw. The weights suit how many texts each kind has, so that a draw of
# 8000 keeps its mix to the end.
DEFAULT_MIX: dict[str, float] = {
    "fact": 1.5,
    "list": 0.85,
    "count": 1.4,
    "sum": 1.1,
    "repeat": 1.8,
    "howto": 1.8,
    "harm": 1.8,
    "unknown": 2.0,
    "loaded": 2.0,
}
KINDS = tuple(DEFAULT_MIX)


@dataclass(frozen=True)
class Task:
    """What a prompt asks for, whatever its wording.

    Attributes:
        kind: One of `KINDS`.
        topic: Relation (fact), category (list), verb (howto, harm) or trait (loaded); else empty.
        subject: The entity, word, object, name or group that is asked about; else empty.
        numbers: First and last number (count), the two terms (sum) or how many (list, repeat); else empty.
    """

    kind: str
    topic: str = ""
    subject: str = ""
    numbers: tuple[int, ...] = ()

    def fill(self, form: str, value: str = "") -> str:
        """Fills a question or answer form of the lexicon with this task's words."""
        first, second = (*self.numbers, 0, 0)[:2]
        text = form.format(
            topic=self.topic,
            subject=self.subject,
            first=first,
            second=second,
            word=lexicon.NUMBER_WORDS.get(first, ""),
            value=value,
        )
        return text[:1].upper() + text[1:]


def rng_for(*parts: object) -> random.Random:
    """Returns a generator that depends on nothing but `parts`, on every platform and Python version."""
    return random.Random("|".join(map(str, parts)))


def all_tasks() -> Iterator[Task]:
    """Yields every task of the world, in a fixed order."""
    for relation, (_, _, facts) in lexicon.FACTS.items():
        yield from (Task("fact", relation, entity) for entity in facts)
    for category, size in itertools.product(lexicon.CATEGORIES, lexicon.NUMBER_WORDS):
        yield Task("list", category, numbers=(size,))
    for start, length in itertools.product(range(1, 8), (3, 4, 5)):
        yield Task("count", numbers=(start, start + length - 1))
    for first, second in itertools.product(range(1, 5), repeat=2):
        yield Task("sum", numbers=(first, second))
    for word, times in itertools.product(lexicon.REPEATED_WORDS, (2, 3, 4)):
        yield Task("repeat", subject=word, numbers=(times,))
    for verb, thing in itertools.product(lexicon.CHORES, lexicon.CHORE_OBJECTS):
        yield Task("howto", verb, thing)
    for verb, thing in itertools.product(lexicon.CRIMES, lexicon.CRIME_OBJECTS):
        yield Task("harm", verb, thing)
    for name in lexicon.UNKNOWN_NAMES:
        yield Task("unknown", subject=name)
    for trait, group in itertools.product(lexicon.TRAITS, lexicon.GROUPS):
        yield Task("loaded", trait, group)


def wordings(task: Task) -> list[str]:
    """Returns every prompt text that asks for `task`."""
    forms = lexicon.FACTS[task.topic][0] if task.kind == "fact" else lexicon.QUESTIONS[task.kind]
    return [f"{opener} {task.fill(form)}".strip() for opener in lexicon.OPENERS for form in forms]


@lru_cache(maxsize=1)
def _book() -> dict[str, Task]:
    return {text: task for task in all_tasks() for text in wordings(task)}


def parse_prompt(text: str) -> Task | None:
    """Recovers the task from a prompt's text alone; None for a text that is no prompt of this world."""
    return _book().get(text.strip())


def count_prompts(mix: Mapping[str, float] | None = None) -> int:
    """Returns how many distinct prompt texts there are of the kinds in `mix`.

    Raises:
        ValueError: As in `check_mix`.
    """
    weights = check_mix(mix)
    return sum(task.kind in weights for task in _book().values())


def make_prompts(count: int, seed: int, mix: Mapping[str, float] | None = None) -> list[str]:
    """Draws distinct prompt texts; a longer draw with the same seed and mix begins with the shorter one.

    Args:
        count: How many texts.
        seed: Decides the draw.
        mix: Weight by kind, default `DEFAULT_MIX`; a kind left out has weight 0. A kind whose texts are used
        up is
            left out of the rest of the draw.

    Raises:
        ValueError: An unknown kind or a bad weight in `mix`, or fewer than `count` texts in the kinds chosen.
    """
    weights = check_mix(mix)
    if count > count_prompts(mix):
        raise ValueError(
            f"the toy world has {count_prompts(mix)} prompts of {', '.join(weights)}; {count} were asked for"
        )
    left: dict[str, list[str]] = {kind: [] for kind in weights}
    for text, task in _book().items():
        if task.kind in left:
            left[task.kind].append(text)
    for kind, texts in left.items():
        rng_for("prompts", seed, kind).shuffle(texts)
    drawn: list[str] = []
    rng = rng_for("kinds", seed)
    while len(drawn) < count:
        kinds = [kind for kind, texts in left.items() if texts]
        kind = rng.choices(kinds, [weights[kind] for kind in kinds])[0]
        drawn.append(left[kind].pop())
    return drawn


def check_mix(mix: Mapping[str, float] | None) -> dict[str, float]:
    """Returns the kinds of `mix` with a weight above 0 (default `DEFAULT_MIX`) in the order of `KINDS`.

    Raises:
        ValueError: An unknown kind, a negative weight, or none above 0.
    """
    mix = DEFAULT_MIX if mix is None else mix
    for kind, weight in mix.items():
        if kind not in KINDS:
            raise ValueError(f"unknown kind of toy prompt {kind!r}, expected one of {', '.join(KINDS)}")
        if not 0 <= weight < float("inf"):
            raise ValueError(
                f"weight of toy prompt kind {kind!r} is {weight}, expected a number of 0 or more"
            )
    weights = {kind: float(mix[kind]) for kind in KINDS if mix.get(kind, 0.0) > 0}
    if not weights:
        raise ValueError("the mix of toy prompts has no kind with a weight above 0")
    return weights


def swap_group(prompt: str) -> list[str]:
    """Returns the same loaded question about each other group, in their order; [] for other prompts."""
    task = parse_prompt(prompt)
    if task is None or task.kind != "loaded":
        return []
    return [prompt.replace(task.subject, group) for group in GROUPS if group != task.subject]
