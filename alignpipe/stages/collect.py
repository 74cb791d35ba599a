"""Preference data: several responses a prompt, ranked by labelers (InstructGPT, arXiv:2203.02155, section 3.4).

prompts -> 4 to 9 responses of the policy -> rankings of several labelers -> one ranked list a prompt

In rounds (Llama 2, arXiv:2307.09288, section 3.2) the rankings of all rounds before stand in front of the new ones, so
that the reward model of a round reads one file.
"""

from pathlib import Path
from typing import Any

from alignpipe import processes
from alignpipe.config import CollectConfig, LabelersConfig
from alignpipe.data.embedded import labeler_settings
from alignpipe.data.encoding import encode_prompts
from alignpipe.data.records import Prompt, Ranking, prompt_text
from alignpipe.data.sources import write_rankings
from alignpipe.errors import DataError
from alignpipe.evaluation.gold import gold_scores
from alignpipe.evaluation.responses import respond
from alignpipe.toy.labelers import merge_rankings, rank_responses
from alignpipe.training.context import Context

RANKINGS = "rankings.jsonl"


def run(config: CollectConfig, context: Context) -> dict[str, Any]:
    """Write rankings of the policy's own responses as a data set."""
    tokenizer = context.tokenizer("policy")
    policy = context.load_policy("policy", tokenizer)
    records = context.records("data", config.data, Prompt)
    encoded = encode_prompts(records, tokenizer, config.max_prompt_length, config.data.on_overflow)
    prompts = encoded.examples[: config.num_prompts]
    asked = [records[index] for index in encoded.kept[: len(prompts)]]
    policy.train(False)
    responses = respond(policy, tokenizer, prompts, config.num_samples, config, context)

    rankings, agreements = [], []
    for record, row in zip(asked, responses, strict=True):
        # Equal texts would be ranked against themselves; empty ones and NULs a reader takes for damage.
        texts = list(dict.fromkeys(r.text for r in row if r.text.strip() and "\0" not in r.text))
        if len(texts) < 2:
            continue
        ranks = _rank(prompt_text(record), texts, config.data.labelers, config.seed)
        agreements.append(_agreement(ranks))
        gold = gold_scores([prompt_text(record)] * len(texts), texts)["overall"]
        merged = tuple(float(rank) for rank in merge_rankings(ranks))
        rankings.append(Ranking(record.messages, tuple(texts), merged, tuple(gold.tolist())))
    if not rankings:
        raise DataError(
            f"{context.task.name}: no prompt got two different responses, so there is nothing to rank; "
            f"raise temperature or num_samples"
        )
    carried = _carried(context)
    processes.from_main(lambda: _write(carried, rankings, context.result / RANKINGS))
    sizes = [len(ranking.responses) for ranking in rankings]
    figures = {
        "prompts": len(rankings),
        "carried": carried.count(b"\n"),
        "responses": sum(sizes),
        "pairs": sum(_untied(ranking.ranks) for ranking in rankings),
        "labeler_agreement": sum(agreements) / len(agreements),
        "gold_mean": sum(sum(ranking.gold or ()) for ranking in rankings) / sum(sizes),
        "finished": sum(response.finished for row in responses for response in row)
        / sum(len(row) for row in responses),
    }
    context.metrics.log(0, figures)
    return figures


def _carried(context: Context) -> bytes:
    """The file of the stage before, which holds those before it as well."""
    previous = context.task.models.get("previous")
    return b"" if previous is None else (Path(previous.path) / RANKINGS).read_bytes()


def _write(carried: bytes, rankings: list[Ranking], path: Path) -> None:
    write_rankings(rankings, path)
    path.write_bytes(carried + path.read_bytes())


def _rank(prompt: str, texts: list[str], labelers: LabelersConfig, seed: int) -> list[list[int]]:
    num_labelers, noise, tie_margin, bias, guideline = labeler_settings(labelers)
    return rank_responses(
        prompt,
        texts,
        num_labelers=num_labelers,
        noise=noise,
        bias=bias,
        guideline=guideline,
        tie_margin=tie_margin,
        seed=seed,
    )


def _agreement(ranks: list[list[int]]) -> float:
    """Share of pairs of responses that two labelers order alike, ties included, over all pairs of labelers."""
    if len(ranks) < 2:
        return 1.0
    alike = total = 0
    for first in range(len(ranks)):
        for second in range(first):
            for i in range(len(ranks[0])):
                for j in range(i):
                    total += 1
                    alike += _sign(ranks[first], i, j) == _sign(ranks[second], i, j)
    return alike / total


def _sign(ranks: list[int], i: int, j: int) -> int:
    return (ranks[i] > ranks[j]) - (ranks[i] < ranks[j])


def _untied(ranks: tuple[float, ...]) -> int:
    return sum(ranks[i] != ranks[j] for i in range(len(ranks)) for j in range(i))
