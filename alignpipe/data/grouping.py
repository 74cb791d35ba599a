"""How many samples and prompts are computed together; no torch, since the plan of memory counts with them too."""

from math import ceil

# Samples of a prompt that are held together at most: each of them multiplies with the keys of all.
GROUP_SIZE = 8
# Tokens of prompts, padding among them, in one forward: enough to keep a machine busy, few enough for its caches.
PREFILL_TOKENS = 2048


def group_size(num_samples: int, batch_size: int) -> int:
    """Samples of a prompt that begin together: as many in each group as in the others, or nearly.

    Args:
        num_samples: to each prompt.
        batch_size: under way at once, over all prompts.
    """
    most = min(GROUP_SIZE, batch_size)
    return ceil(num_samples / ceil(num_samples / most))
