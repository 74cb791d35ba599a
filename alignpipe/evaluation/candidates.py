"""The responses that rejection sampling chooses from: those of earlier rounds beside the new, and who may be chosen.

candidates.jsonl <-> responses by prompt; responses, rewards -> for each, why it must not be chosen, or nothing
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignpipe.evaluation.responses import Response

CANDIDATES = "candidates.jsonl"
# Why a response is not chosen; the first that holds is counted.
REASONS = ("no_eos", "too_short", "copy", "duplicate", "low_reward")


@dataclass(frozen=True)
class Candidate:
    """One response that may be learnt.

    Attributes:
        response: its tokens and text.
        reward: by the reward model of the stage that chooses.
        origin: 0 for the stage's own samples, k for the k-th stage of its pool.
    """

    response: Response
    reward: float
    origin: int = 0


def refusals(
    prompt: Sequence[int], candidates: Sequence[Candidate], min_length: int, min_reward: float | None
) -> list[str | None]:
    """Why each candidate of one prompt must not be chosen.

    Args:
        prompt: token ids.
        candidates: in order; of those equal token for token the first counts as the original.
        min_length: tokens of a response, its stop token not counted.
        min_reward: None for no floor.

    Returns:
        One of `REASONS` each; None for those that may be chosen.
    """
    seen: set[tuple[int, ...]] = set()
    found: list[str | None] = []
    for candidate in candidates:
        ids = tuple(candidate.response.ids)
        reason = None
        if not candidate.response.finished:
            reason = "no_eos"
        elif len(ids) - 1 < min_length:
            reason = "too_short"
        elif copies(prompt, ids):
            reason = "copy"
        elif ids in seen:
            reason = "duplicate"
        elif min_reward is not None and candidate.reward < min_reward:
            reason = "low_reward"
        seen.add(ids)
        found.append(reason)
    return found


def copies(prompt: Sequence[int], response: Sequence[int]) -> bool:
    """Whether the response, but for its stop token, stands in the prompt word for word at full length."""
    body = list(response[:-1])
    return len(body) >= len(prompt) // 2 and any(
        list(prompt[start : start + len(body)]) == body for start in range(len(prompt) - len(body) + 1)
    )


def write_candidates(prompts: Sequence[str], candidates: Sequence[Sequence[Candidate]], path: Path) -> None:
    """Write the responses to each prompt, one a line, for later rounds to choose from."""
    with path.open("w", encoding="utf-8") as file:
        for prompt, row in zip(prompts, candidates, strict=True):
            for candidate in row:
                line = {
                    "prompt": prompt,
                    "response": candidate.response.text,
                    "ids": candidate.response.ids,
                    "reward": candidate.reward,
                    "finished": candidate.response.finished,
                }
                # A sampled text may hold half of a surrogate pair, which ASCII escapes carry.
                file.write(json.dumps(line) + "\n")


def read_candidates(path: Path) -> dict[str, list[Response]]:
    """The responses by prompt; their rewards are another reward model's and do not compare."""
    found: dict[str, list[Response]] = defaultdict(list)
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            found[row["prompt"]].append(Response(row["ids"], row["response"], row["finished"]))
    return found
