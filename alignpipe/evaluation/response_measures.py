"""Everything that is measured of one response at a time: gold, reward, length, EOS, refusal, repetition.

prompts, K responses to each -> columns (N, K) by name
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from alignpipe.evaluation import text_measures
from alignpipe.evaluation.gold import gold_scores
from alignpipe.evaluation.questions import Questions
from alignpipe.evaluation.responses import Response
from alignpipe.evaluation.rewards import Reward
from alignpipe.toy import judge

Columns = dict[str, NDArray[np.float64]]


def response_columns(
    questions: Questions, responses: Sequence[Sequence[Response]], reward: Reward | None
) -> Columns:
    """One value a response of all that can be told without the policy.

    Args:
        questions: N of them.
        responses: K to each.
        reward: of them, if there is one; its terms are columns too.

    Returns:
        Name of the figure -> (N, K).
    """
    flat = [response for row in responses for response in row]
    texts = [response.text for response in flat]
    refuses = judge.is_refusal if questions.judged else text_measures.is_refusal
    bodies = [response.ids[: len(response.ids) - response.finished] for response in flat]
    asked = [text for text, row in zip(questions.texts, responses, strict=True) for _ in row]
    found: Columns = {}
    if questions.judged:
        found = {f"gold.{measure}": values for measure, values in gold_scores(asked, texts).items()}
    if reward is not None:
        scored = reward(asked, texts, questions.examples(responses))
        found |= {"reward": scored.rewards, **scored.columns}
    rest = {
        "length": [len(response.ids) for response in flat],
        "words": [len(text_measures.words_of(text)) for text in texts],
        "finished": [response.finished for response in flat],
        "refusal": [refuses(text) for text in texts],
        "repetition": [text_measures.ends_in_loop(ids) for ids in bodies],
        "seq_rep_4": [text_measures.sequence_repetition(ids) for ids in bodies],
    }
    found |= {name: np.array(values, dtype=np.float64) for name, values in rest.items()}
    return {name: values.reshape(len(responses), -1) for name, values in found.items()}
