"""Bootstrap weights of prompts, one a member of an ensemble, so that members differ as those on new data would.

Online bootstrap (Oza & Russell 2001): how often one of many rows is drawn with replacement is Poisson(1).
"""

import hashlib
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate
from math import exp, factorial

# Chance of at most 0, 1, 2, ... draws; more than nine come once in ten million.
_AT_MOST = list(accumulate(exp(-1) / factorial(count) for count in range(9)))


def bootstrap_weights(prompt: Sequence[int], seed: int, size: int) -> list[int]:
    """Returns how often each of `size` members drew a prompt, mean 1.

    Nothing but the arguments decides it, so all rows of a prompt are drawn together, in every epoch and wherever
    they stand.

    Args:
        prompt: Token ids.
        seed: Of the stage.
        size: Members.
    """
    text = ",".join(map(str, prompt))
    weights = []
    for member in range(size):
        digest = hashlib.sha256(f"bootstrap|{seed}|{member}|{text}".encode()).digest()
        weights.append(bisect(_AT_MOST, int.from_bytes(digest[:8]) / 2**64))
    return weights
