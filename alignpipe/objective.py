"""What the jobs of a sweep are compared by: `STAGE.FIGURE`, checked before anything runs, read when all is done.

A policy's figures are those of its scorecard, `ppo.gold.overall`; every other figure is a metric of its stage,
`rm.gold_accuracy`.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from alignpipe.config import TOY, Config, EvalConfig, StageConfig, has_reward
from alignpipe.errors import ConfigError, did_you_mean, nearest

# Figures of a policy in the scorecard -> the key of the eval stage that they need, or None.
POLICY_FIGURES: dict[str, str | None] = {
    "gold.overall": "judge",
    "gold.helpful": "judge",
    "gold.truthful": "judge",
    "gold.harmless": "judge",
    "prejudice.gold_gap": "judge",
    "prejudice.refusal_gap": "judge",
    "prejudice.reward_gap": "reward_model",
    "reward": "reward_model",
    "kl": "reference",
    "kl_per_token": "reference",
    "best_of_n": "reference",
    "win_rate.gold": "judge",
    "win_rate.reward": "reward_model",
    "length_controlled_win_rate.gold": "judge",
    "length_controlled_win_rate.reward": "reward_model",
    "perplexity": None,
    "length": None,
    "words": None,
    "finished": None,
    "refusal": None,
    "repetition": None,
    "seq_rep_4": None,
    "distinct_1": None,
    "distinct_2": None,
    "expectation_adjusted_distinct": None,
}
# Metrics that a stage ends with, by kind.
STAGE_FIGURES: dict[str, tuple[str, ...]] = {
    "sft": ("eval_loss", "eos_rate"),
    "collect": ("labeler_agreement", "gold_mean", "finished"),
    "rm": (
        "accuracy",
        "gold_accuracy",
        "margin",
        "calibration_error",
        "eval_loss",
        "length_spearman",
        "stress.filler.rate",
        "stress.flattery.rate",
        "stress.doubled.rate",
        "stress.other_answer.rate",
        "stress.cut_before_eos.rate",
    ),
    "rs": ("eval_loss", "reward_mean", "reward_best", "reward_selected", "unanswered", "length_shift"),
    "ppo": ("reward", "kl"),
    "dpo": ("eval_loss", "eval_accuracy", "eos_rate"),
    "eval": (),
}
# What the training itself pushes up; ranking by it is reward hacking by hyperparameter (arXiv:2210.10760).
PROXIES = (
    "reward",
    "reward_mean",
    "reward_best",
    "reward_selected",
    "win_rate.reward",
    "length_controlled_win_rate.reward",
)
_LOW_IS_BEST = (
    "loss",
    "spearman",
    "kl",
    "kl_per_token",
    "best_of_n",
    "gap",
    "error",
    "unanswered",
    "shift",
    "perplexity",
    "repetition",
    "seq_rep_4",
)


def check_objective(config: Config) -> None:
    """Refuse an objective that no run of this configuration can have, or that training itself maximizes.

    Raises:
        ConfigError: with the nearest figure there is.
    """
    objective = config.objective
    if objective is None:
        return
    known = list(known_figures(config))
    name, _, figure = objective.partition(".")
    if objective not in known:
        raise ConfigError(f"objective: {why_no_figure(config, name, figure)}")
    if figure in PROXIES and not config.objective_allow_proxy:
        gold = f"{name}.gold.overall"
        instead = f"take {gold}" if gold in known else "take a figure that it is not trained on"
        raise ConfigError(
            f"objective: {objective} is the reward that training maximizes, not how good the answers are; {instead}, "
            f"or allow it with objective_allow_proxy=true"
        )


def check_searchable(config: Config, sweeper: str) -> None:
    """Refuse a search over runs that end without a figure to search by.

    Raises:
        ConfigError: with a figure that there is.
    """
    judge = _judge(config)
    if config.objective is None and (judge is None or _lacks(judge, "gold.overall") is not None):
        known = [item for item in known_figures(config) if item.partition(".")[2] not in PROXIES]
        hint = f"for example objective={known[0]}" if known else "add an eval stage to pipeline.order"
        raise ConfigError(f"hydra/sweeper={sweeper}: there is no gold score to search by; {hint}")


def is_low_best(config: Config) -> bool:
    """Whether the smallest value of the objective is the best one."""
    if config.objective_direction == "auto":
        last = (config.objective or "").rpartition(".")[2]
        return ".stress." in (config.objective or "") or last.endswith(_LOW_IS_BEST)
    return config.objective_direction == "minimize"


def objective_title(config: Config) -> str:
    """What the objective is called in a table."""
    return config.objective or "gold"


def objective_value(
    objective: str | None, scorecard: Mapping[str, Any] | None, metrics: Mapping[str, Mapping[str, Any]]
) -> float | None:
    """Read an objective once a run is done.

    Args:
        objective: `STAGE.FIGURE`; None for the gold score of the last policy.
        scorecard: of the run, None where no eval stage ran.
        metrics: last figures of each stage, by name.

    Returns:
        Its value; None where the run has none, such as a loss without held-out rows.
    """
    policies = {} if scorecard is None else scorecard["policies"]
    if objective is None:
        return read_figure(list(policies.values())[-1], "gold.overall") if policies else None
    name, _, figure = objective.partition(".")
    found = read_figure(policies.get(name), figure)
    return read_figure(metrics.get(name), figure) if found is None else found


def read_figure(figures: Any, path: str) -> float | None:
    """The number at a dotted path of nested figures, or None where there is none."""
    for part in path.split("."):
        figures = figures.get(part) if isinstance(figures, Mapping) else None
    return float(figures) if isinstance(figures, int | float) else None


def running_stages(config: Config) -> dict[str, StageConfig]:
    """The stages that run, by name."""
    if config.stage is not None:
        return {config.stage.kind: config.stage}
    order = config.pipeline.order if config.pipeline is not None else []
    return {name: config.stages[name] for name in order if name in config.stages}


def _judge(config: Config) -> EvalConfig | None:
    """The eval stage that the scorecard is made of: the last one."""
    judges = [stage for stage in running_stages(config).values() if isinstance(stage, EvalConfig)]
    return judges[-1] if judges else None


def _lacks(judge: EvalConfig, figure: str) -> str | None:
    """What an eval stage lacks for a figure: a word that would give it, or None."""
    need = POLICY_FIGURES[figure]
    if "win_rate" in figure and judge.win_rate_against is None:
        return "a win_rate_against in the eval stage"
    if figure == "perplexity" and judge.text_rows == 0:
        return "text_rows above 0 in the eval stage"
    if (need == "judge" or figure.startswith("prejudice")) and (
        judge.judge == "none" or (judge.judge == "auto" and judge.data.path != TOY)
    ):
        return "data=toy, since the gold judge knows the embedded world alone"
    if need == "reward_model" and not has_reward(judge):
        return "a reward_model in the eval stage"
    if need == "reference" and judge.reference is None:
        return "a reference in the eval stage"
    return None


def known_figures(config: Config) -> Iterator[str]:
    """Every `STAGE.FIGURE` that a run of this configuration ends with."""
    judge = _judge(config)
    if judge is not None:
        for policy in judge.policies:
            yield from (f"{policy}.{figure}" for figure in POLICY_FIGURES if _lacks(judge, figure) is None)
    for name, stage in running_stages(config).items():
        yield from (f"{name}.{figure}" for figure in STAGE_FIGURES[stage.kind])


def why_no_figure(config: Config, name: str, figure: str) -> str:
    """Why a run of this configuration has no such figure, and which it has instead."""
    judge, known = _judge(config), list(known_figures(config))
    names = sorted({item.partition(".")[0] for item in known} | set(running_stages(config)))
    if name not in names:
        near = nearest(name, names)
        mended = f"{near}.{figure}" if figure and f"{near}.{figure}" in known else near
        hint = f"Did you mean {mended}?" if near else did_you_mean(name, names)
        return f"there is no stage {name!r} here. {hint}"
    own = [item for item in known if item.partition(".")[0] == name]
    if figure in POLICY_FIGURES and judge is None:
        return f"{name}.{figure} needs an eval stage in pipeline.order"
    if judge is not None and name not in judge.policies and figure in POLICY_FIGURES:
        return (
            f"{name}.{figure} needs {name} among the policies of the eval stage ({', '.join(judge.policies)})"
        )
    if judge is not None and figure in POLICY_FIGURES and (lack := _lacks(judge, figure)) is not None:
        return f"{name}.{figure} needs {lack}"
    if not figure:
        return (
            f"{name} is a stage, name one of its figures: {', '.join(own)}"
            if own
            else f"{name} has no figure"
        )
    return f"stage {name} has no figure {figure!r}. {did_you_mean(f'{name}.{figure}', own)}"
