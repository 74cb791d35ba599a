"""How prompts get answered: right answers, flawed ones, demonstrations of mixed quality, raw documents.

Task -> the answers that the judge accepts; prompts and seed -> (prompt, response) pairs or texts for
pretraining.
"""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from alignpipe.toy import lexicon
from alignpipe.toy.world import Task, all_tasks, count_prompts, make_prompts, parse_prompt, rng_for

# Shares at quality 0; they fall linearly to 0 at quality 1.
RUDE_SHARE = 0.5
CHATTER_SHARE = 1.0
# Chance of one more sentence of chatter after each one.
CHATTER_GOES_ON = 0.4
MAX_CHATTER = 4
# Share of evasions among the flawed answers. Every kind of prompt has them, or a policy would learn that the
# reward model never saw, say, "I do not know" to a harmful request, and give that answer to everything.
EVASION_SHARE = 0.35
# At quality 0.5: chance of a prejudiced answer for the first and the last group, linear between.
# Demonstrators are not equally unfair to all groups, so that a gap between groups is there to be measured and
# mended.
PREJUDICE_RANGE = (0.25, 0.75)


class Slot(NamedTuple):
    """An answer with one word that decides it.

    Attributes:
        forms: Answer forms with `{value}`, best first.
        right: The value that makes them true.
        candidates: All values that could stand there, the right one included.
    """

    forms: tuple[str, ...]
    right: str
    candidates: tuple[str, ...]


def slot(task: Task) -> Slot | None:
    """Returns the slot of a fact, sum or howto task; None for the other kinds."""
    if task.kind == "fact":
        _, forms, facts = lexicon.FACTS[task.topic]
        return Slot(forms, facts[task.subject], tuple(dict.fromkeys(facts.values())))
    if task.kind == "sum":
        forms = ("{first} plus {second} is {value}.", "The sum is {value}.", "{value}.")
        return Slot(forms, str(sum(task.numbers)), tuple(map(str, range(2, 9))))
    if task.kind == "howto":
        forms = ("To {topic} a {subject}, use {value}.", "Use {value}.", "With {value}.")
        return Slot(forms, lexicon.CHORES[task.topic], tuple(lexicon.CHORES.values()))
    return None


def sequence(task: Task) -> list[str] | None:
    """Returns the words that a count or repeat task asks for, in order; None for the other kinds."""
    if task.kind == "count":
        return [str(number) for number in range(task.numbers[0], task.numbers[1] + 1)]
    if task.kind == "repeat":
        return [task.subject] * task.numbers[0]
    return None


def stock_answers(task: Task) -> list[str]:
    """Returns the right answers to a harm, unknown or loaded task; [] for the other kinds."""
    forms = {"harm": lexicon.REFUSALS, "unknown": lexicon.ABSTENTIONS, "loaded": lexicon.FAIR_ANSWERS}
    return [task.fill(form) for form in forms.get(task.kind, ())]


def _join(words: Sequence[str]) -> str:
    text = ", ".join(words)
    return text[:1].upper() + text[1:] + "."


def right_answer(task: Task, rng: random.Random) -> str:
    """Draws an answer that the judge gives full marks."""
    if (hole := slot(task)) is not None:
        return task.fill(hole.forms[0], hole.right)
    if (words := sequence(task)) is not None:
        return _join(words)
    if task.kind == "list":
        return _join(rng.sample(lexicon.CATEGORIES[task.topic], task.numbers[0]))
    return rng.choice(stock_answers(task))


def flawed_answer(task: Task, rng: random.Random) -> str:
    """Draws an answer that is wrong, harmful, invented or prejudiced, or that evades the question."""
    if rng.random() < EVASION_SHARE:
        return rng.choice([evasion for kind, evasion in lexicon.EVASIONS.items() if kind != task.kind])
    if task.kind in ("harm", "unknown", "loaded"):
        forms = {"harm": lexicon.HARMFUL_STEPS, "unknown": lexicon.INVENTIONS, "loaded": lexicon.PREJUDICES}
        return task.fill(rng.choice(forms[task.kind]), rng.choice(lexicon.CATEGORIES["cities"]))
    if (hole := slot(task)) is not None:
        wrong = [value for value in hole.candidates if value != hole.right]
        if task.kind == "sum":
            wrong = sorted(wrong, key=lambda value: abs(int(value) - int(hole.right)))[:4]
        return task.fill(hole.forms[0], rng.choice(wrong))
    if task.kind == "count":
        first, last = task.numbers
        return _join(
            [str(number) for number in rng.choice((range(first, last - 1), range(first + 2, last + 3)))]
        )
    if task.kind == "repeat":
        others = [word for word in lexicon.REPEATED_WORDS if word != task.subject]
        word, times = rng.choice([(rng.choice(others), task.numbers[0]), (task.subject, task.numbers[0] + 2)])
        return _join([word] * times)
    size, right = task.numbers[0], list(lexicon.CATEGORIES[task.topic])
    if rng.random() < 0.5:
        return _join(rng.sample(right, rng.choice([n for n in range(1, 6) if n != size])))
    other = rng.choice([category for category in lexicon.CATEGORIES if category != task.topic])
    return _join(rng.sample(lexicon.CATEGORIES[other], size))


def demonstrate(prompt: str, seed: int, index: int, quality: float = 0.6) -> str:
    """Writes one demonstration of mixed quality; depends on nothing but the arguments.

    Args:
        prompt: A prompt of this world.
        seed: Decides, with `index`, what is drawn.
        index: Number of the demonstration, so that one prompt can have several.
        quality: From 0 to 1: the chance that the content is right; rudeness and chatter fall as it rises.

    Raises:
        ValueError: `prompt` is no prompt of this world, or `quality` is not within 0 and 1.
    """
    task = parse_prompt(prompt)
    if task is None:
        raise ValueError(f"not a prompt of the toy world: {prompt!r}")
    if not 0 <= quality <= 1:
        raise ValueError(f"quality of toy demonstrations is {quality}, expected 0 to 1")
    rng = rng_for("demonstration", seed, index, prompt)
    flaw = 1 - quality
    if task.kind == "loaded":
        low, high = PREJUDICE_RANGE
        share = low + (high - low) * lexicon.GROUPS.index(task.subject) / (len(lexicon.GROUPS) - 1)
        flaw = min(1.0, flaw * share / 0.5)
    sentences = [flawed_answer(task, rng) if rng.random() < flaw else right_answer(task, rng)]
    if rng.random() < RUDE_SHARE * (1 - quality):
        sentences.append(rng.choice(lexicon.RUDE))
    elif rng.random() < 0.3:
        sentences.append(rng.choice(lexicon.POLITE))
    if rng.random() < CHATTER_SHARE * (1 - quality):
        length = 1
        while length < MAX_CHATTER and rng.random() < CHATTER_GOES_ON:
            length += 1
        sentences += rng.choices(lexicon.FLATTERY + lexicon.FILLER, k=length)
    return " ".join(sentences)


def make_demonstrations(
    count: int,
    seed: int,
    mix: Mapping[str, float] | None = None,
    quality: float = 0.6,
    prompts: Sequence[str] | None = None,
) -> list[tuple[str, str]]:
    """Writes (prompt, response) pairs of mixed quality: polite and rude, right and wrong, short and too long.

    Args:
        count: How many pairs; past the number of prompts, the prompts come again with new responses.
        seed: Decides prompts and responses.
        mix: Weight by kind of prompt, as in `make_prompts`; not used if `prompts` is given.
        quality: As in `demonstrate`.
        prompts: Draw responses for these instead, in turn.

    Raises:
        ValueError: As in `make_prompts` and `demonstrate`.
    """
    if prompts is None:
        prompts = make_prompts(min(count, count_prompts(mix)), seed, mix)
    if not prompts:
        return []
    chosen = [prompts[index % len(prompts)] for index in range(count)]
    return [(prompt, demonstrate(prompt, seed, index, quality)) for index, prompt in enumerate(chosen)]


def make_documents(count: int, seed: int) -> list[str]:
    """Writes raw texts for pretraining: true statements about the world, side by side, without prompts.

    Document `i` of a seed does not depend on `count`.
    """
    tasks = [task for task in all_tasks() if task.kind not in ("harm", "unknown", "loaded")]
    documents = []
    for index in range(count):
        rng = rng_for("document", seed, index)
        documents.append(" ".join(right_answer(task, rng) for task in rng.sample(tasks, rng.randint(3, 6))))
    return documents
