"""The run's last word: figures of every policy side by side, and what to try next.

scores of the eval stage, by position -> `scorecard.json`, by stage name -> a table
"""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignpipe.artifact import Manifest, write_json
from alignpipe.config import EvalConfig
from alignpipe.pipeline.graph import Graph, Node
from alignpipe.pipeline.store import Store

SCORECARD = "scorecard.json"
SCORES = "scores.json"


def write_scorecard(graph: Graph, store: Store, folder: Path) -> dict[str, Any] | None:
    """Name the scores of the last eval stage after the run's stages.

    Returns:
        The scorecard; None where no eval stage ran.
    """
    judged = [node for node in graph.order if isinstance(node.config, EvalConfig)]
    if not judged:
        return None
    node = judged[-1]
    scores = json.loads((store.stage(node.kind, node.key) / SCORES).read_text(encoding="utf-8"))
    names = [node.models[f"policy_{index}"].name for index in range(len(scores["policies"]))]
    reward_model = _reward_model(node, graph, store)
    metrics = {} if reward_model is None else reward_model.metrics
    scorecard = {
        "num_prompts": scores["num_prompts"],
        "policies": dict(zip(names, scores["policies"], strict=True)),
        "gains": [
            {**gain, "before": names[gain["before"]], "after": names[gain["after"]]}
            for gain in scores["gains"]
        ],
        "reward_model": {"accuracy": metrics.get("accuracy"), "gold_accuracy": metrics.get("gold_accuracy")},
    }
    write_json(folder / SCORECARD, scorecard)
    return scorecard


def _reward_model(node: Node, graph: Graph, store: Store) -> Manifest | None:
    ref = node.models.get("reward_model")
    if ref is None:
        return None
    key = graph.nodes[ref.stage].key if ref.stage is not None else ref.key
    return store.find("rm", key) if ref.kind == "rm" else None


def print_scorecard(scorecard: dict[str, Any] | None, folder: Path, console: Console) -> None:
    """Show a scorecard as a table, its gains in words, and the next thing to try."""
    if scorecard is None:
        return
    table = Table(box=None, pad_edge=False, collapse_padding=True)
    for title in ("policy", "overall", "95 %", "helpful", "truthful", "harmless", "reward", "KL", "length"):
        table.add_column(title, justify="left" if title == "policy" else "right", no_wrap=True)
    for name, figures in scorecard["policies"].items():
        gold = figures["gold"]
        interval = "-" if gold["ci95"] is None else f"{gold['ci95'][0]:.3f} {gold['ci95'][1]:.3f}"
        measures = [_shown(gold[measure]) for measure in ("helpful", "truthful", "harmless")]
        rest = [_shown(figures["reward"], 2), _shown(figures["kl"], 1), _shown(figures["length"], 1)]
        table.add_row(*(Text(cell) for cell in (name, _shown(gold["overall"]), interval, *measures, *rest)))
    console.print()
    console.print(table)
    for line in _words(scorecard):
        console.print(Text(line), soft_wrap=True)
    console.print(Text(f"\nscorecard  {folder / SCORECARD}"), soft_wrap=True)


def _shown(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _words(scorecard: dict[str, Any]) -> list[str]:
    lines = [
        f"gold {gain['before']} -> {gain['after']}: {gain['gold']:+.3f} "
        f"[{gain['ci95'][0]:+.3f}, {gain['ci95'][1]:+.3f}]"
        for gain in scorecard["gains"]
    ]
    for name, figures in scorecard["policies"].items():
        terms = {key.removeprefix("reward/"): value for key, value in figures.items() if "/" in key}
        if terms:
            lines.append(
                f"reward of {name}: " + "  ".join(f"{term} {mean:.3f}" for term, mean in terms.items())
            )
    accuracy, gold = scorecard["reward_model"]["accuracy"], scorecard["reward_model"]["gold_accuracy"]
    if accuracy is not None:
        against = f", {gold:.3f} against gold" if gold is not None else ""
        lines.append(f"reward model: held-out accuracy {accuracy:.3f}{against}")
    lines += [f"warning: {line}" for line in hacked(scorecard)]
    return lines + [f"try next: {line}" for line in _next(scorecard)]


def hacked(scorecard: dict[str, Any]) -> list[str]:
    """Pairs of neighbours whose reward rose while their gold score fell (arXiv:2210.10760)."""
    found = []
    for gain in scorecard["gains"]:
        before, after = (scorecard["policies"][gain[side]]["reward"] for side in ("before", "after"))
        if before is not None and after > before and gain["ci95"][1] < 0:
            found.append(
                f"reward hacking from {gain['before']} to {gain['after']}: "
                f"reward {before:.2f} -> {after:.2f} while gold changed by {gain['gold']:+.3f}"
            )
    return found


def _next(scorecard: dict[str, Any]) -> list[str]:
    if hacked(scorecard):
        return ["a larger stages.ppo.kl_coef, fewer stages.ppo.num_rollouts, or labelers without bias"]
    if not scorecard["gains"]:
        return ["alignpipe run stage=eval stage.policies=[base,latest/sft] to compare other checkpoints"]
    return [
        "alignpipe run experiment=reward_hacking       see a biased reward model being exploited",
        "alignpipe run pipeline=zephyr_style           DPO on the same preferences",
        "alignpipe run stages.ppo.kl_coef=0.2          only PPO and what follows are made again",
        "alignpipe run model=FOLDER data=FILE.jsonl pipeline.order=[sft]     your own model and data",
    ]
