"""The gold judge of the embedded world, for prompts that come from it.

prompts, responses -> helpful, truthful, harmless, overall, each in [0, 1]
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from alignpipe.toy.judge import judge

MEASURES = ("overall", "helpful", "truthful", "harmless")


def gold_scores(prompts: Sequence[str], responses: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Judge one response to each prompt.

    Returns:
        One array (N,) a measure.

    Raises:
        ValueError: a prompt is none of the embedded world's.
    """
    verdicts = [judge(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    return {
        "overall": np.array([verdict.overall for verdict in verdicts]),
        "helpful": np.array([verdict.helpful for verdict in verdicts]),
        "truthful": np.array([verdict.truthful for verdict in verdicts]),
        "harmless": np.array([verdict.harmless for verdict in verdicts]),
    }
