"""A held-out judge beside the training: it looks now and then, raises alarms, and acts on them.

What a policy is trained on rises for longer than what people want of it (Gao et al. 2022, arXiv:2210.10760). So a
judge that the training does not see scores responses to prompts that no stage trains on. The prompts and the random
numbers of sampling are the same at every look: two looks differ by what the policy learnt, not by what it was asked.

policy, held-out prompts -> responses -> judge, proxy, KL, entropy, length, repetition -> go on, stop, or go back
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from alignpipe import processes
from alignpipe.config import JUDGES, TOY, DPOConfig, PPOConfig, RSConfig
from alignpipe.data.encoding import encode_prompts
from alignpipe.data.examples import Example
from alignpipe.data.records import Prompt, prompt_text
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import DataError
from alignpipe.evaluation.alarms import History, Look, raised
from alignpipe.evaluation.gold import gold_scores
from alignpipe.evaluation.rewards import load_reward_model
from alignpipe.evaluation.text_measures import sequence_repetition
from alignpipe.rollout.generate import Sample, sample
from alignpipe.rollout.score import sequence_logprobs
from alignpipe.training.best import BestWeights
from alignpipe.training.context import Context

# In the addresses of random numbers, beyond every rollout of a training.
LOOKING = 2**31

Scores = NDArray[np.float64]
# Texts of the prompts, texts of the responses, both as tokens -> (N,)
Judge = Callable[[Sequence[str], Sequence[str], Sequence[Example]], Scores]


def load_monitor(
    config: RSConfig | PPOConfig | DPOConfig,
    context: Context,
    tokenizer: Tokenizer,
    policy: PreTrainedModel,
    reference: Callable[[], PreTrainedModel],
    proxy: Judge | None = None,
) -> "Monitor":
    """The monitor of a stage, as its configuration says.

    Args:
        config: of the stage.
        context: data, judge, precision.
        tokenizer: of the policy.
        policy: that is trained.
        reference: gives the model that KL is taken against; not called where nothing is monitored.
        proxy: what the training raises; None where it is the implicit reward of dpo, that is the log-ratio itself
            (arXiv:2305.18290, eq. 5).

    Raises:
        DataError: the data has no prompts, or none in the evaluation share.
        CheckpointError: the judge reads other tokens than the policy.
    """
    if config.monitor.action == "none":
        return Monitor(config, context, policy, None)
    if "prompts" not in context.record_types("data", config.data):
        raise DataError(
            f"{context.task.name}: {context.task.data['data'].path} has no prompts to answer; set monitor.action=none"
        )
    records = context.records("data", config.data, Prompt, "eval")
    encoded = encode_prompts(records, tokenizer, config.max_prompt_length, "drop")
    # An eval stage asks the first ones, so what chose a checkpoint is not what it is measured by.
    first = max(0, len(encoded.examples) - config.monitor.num_prompts)
    if not encoded.examples:
        raise DataError(
            f"{context.task.name}: no prompt in the evaluation share; add rows, raise data.shares.eval, "
            f"or set monitor.action=none"
        )
    texts = [prompt_text(records[index]) for index in encoded.kept[first:]]
    judge = _judge(config, context, tokenizer)
    eyes = _Eyes(
        config, context, tokenizer, policy, reference(), proxy, judge, encoded.examples[first:], texts
    )
    return Monitor(config, context, policy, eyes)


class Monitor:
    """Looks at a policy every few rollouts or steps, raises alarms, and acts on them.

    All processes see the same responses and scores, so they come to the same decision.

    Args:
        config: of the stage.
        context: figures and progress.
        policy: that is trained.
        look: at the policy; None where nothing is monitored, and then every method does nothing.
    """

    def __init__(
        self,
        config: RSConfig | PPOConfig | DPOConfig,
        context: Context,
        policy: PreTrainedModel,
        look: Callable[[int], Look] | None,
    ) -> None:
        self._config = config.monitor
        self._unit = "rollout" if isinstance(config, PPOConfig) else "step"
        self._context = context
        self._look = look
        self._total = 0
        self._history: History | None = None
        self._alarms: dict[str, int] = {}
        self._stopped_at: int | None = None
        self._best = BestWeights(policy) if look and self._config.action == "restore" else None

    @property
    def modules(self) -> Mapping[str, nn.Module]:
        """What is saved and resumed beside the models."""
        return {} if self._best is None else {"best": self._best}

    @property
    def went_back(self) -> bool:
        """Whether the policy has the weights of the best look."""
        return self._best is not None and self._stopped_at is not None

    def values(self) -> dict[str, Any]:
        """What is saved with a state, as JSON."""
        if self._look is None:
            return {}
        history = None if self._history is None else asdict(self._history)
        return {"monitor": {"history": history, "alarms": self._alarms}}

    def begin(self, state: Mapping[str, Any], total: int) -> None:
        """Look at the start, or take up what a state holds.

        Args:
            state: values of the state that the stage goes on from.
            total: rollouts or steps of the whole training; the last one is looked at.
        """
        self._total = total
        if self._look is None:
            return
        if (saved := state.get("monitor")) is not None:
            self._history = History(**{name: Look(**look) for name, look in saved["history"].items()})
            self._alarms = dict(saved["alarms"])
            return
        self._history = History.of(self._look(0))
        self._log(self._history.start, 0)

    def ends(self, done: int, step: int) -> bool:
        """Look, if it is time to, and say whether training ends here.

        Args:
            done: rollouts or steps so far.
            step: optimizer updates so far, for the figures.
        """
        if self._look is None or self._history is None:
            return False
        if done % self._config.every and done != self._total:
            return False
        look = self._look(done)
        self._log(look, step)
        alarms = raised(look, self._history, self._config)
        self._history = self._history.joined_by(look)
        if self._best is not None and self._history.best is look:
            self._best.keep()
        new = [name for name in alarms if name not in self._alarms]
        self._alarms |= dict.fromkeys(new, done)
        for name in new:
            self._context.progress.say(
                f"warning: {self._context.task.name}: {name} at {self._unit} {done}: {alarms[name]}; {self._advice()}"
            )
        if not alarms or self._config.action == "warn":
            return False
        self._stopped_at = done
        if self._best is not None:
            self._best.restore()
        return True

    def summary(self) -> dict[str, Any]:
        """Figures for the manifest: since when there are alarms, the best look, where training ended early."""
        if self._history is None:
            return {}
        best = self._history.best
        return {
            "monitor": {
                "alarms": self._alarms,
                "best_at": best.at if best.scores else None,
                "best_held_out": best.held_out,
                "stopped_at": self._stopped_at,
            }
        }

    def _advice(self) -> str:
        assert self._history is not None
        best = self._history.best
        there = f"{self._unit} {best.at}"
        warn = f"restore would end here and go back to {there}" if best.scores else "stop would end here"
        return {
            "warn": f"monitor.action={warn}",
            "stop": "training ends here",
            "restore": f"training ends here, with the weights of {there}, which the judge liked best",
        }[self._config.action]

    def _log(self, look: Look, step: int) -> None:
        figures = {name: value for name, value in asdict(look).items() if name not in ("at", "scores")}
        held_out = {} if look.held_out is None else {"held_out": look.held_out}
        named = {f"monitor/{name}": value for name, value in (held_out | figures).items()}
        self._context.metrics.log(step, named)


@dataclass(frozen=True)
class _Eyes:
    """Samples and measures a policy, the same way each time."""

    config: RSConfig | PPOConfig | DPOConfig
    context: Context
    tokenizer: Tokenizer
    policy: PreTrainedModel
    reference: PreTrainedModel
    proxy: Judge | None
    judge: Judge | None
    prompts: Sequence[Sequence[int]]
    texts: Sequence[str]

    def __call__(self, done: int) -> Look:
        samples = processes.spread([len(prompt) for prompt in self.prompts], self._sample)
        flat = [drawn for row in samples for drawn in row]
        examples = [
            Example.of(prompt, drawn.ids)
            for prompt, row in zip(self.prompts, samples, strict=True)
            for drawn in row
        ]
        pad, size = self.tokenizer.pad_id, self.config.micro_batch_size
        with self.context.autocast():
            reference = sequence_logprobs(self.reference, examples, pad, size, self.config.temperature)
        own = np.array([sum(drawn.logprobs) for drawn in flat])
        lengths = np.array([len(drawn.ids) for drawn in flat])
        log_ratios = own - reference.double().numpy()
        texts = [text for text in self.texts for _ in range(self.config.monitor.num_samples)]
        answers = [self.tokenizer.decode(drawn.ids) for drawn in flat]
        proxy = log_ratios if self.proxy is None else self.proxy(texts, answers, examples)
        return Look(
            at=done,
            scores=self._scores(texts, answers, examples),
            proxy=float(proxy.mean()),
            kl=float(log_ratios.mean()),
            entropy=float(-own.sum() / lengths.sum()),
            length=float(lengths.mean()),
            repetition=float(np.mean([sequence_repetition(drawn.ids) for drawn in flat])),
        )

    def _sample(self, places: list[int]) -> list[list[Sample]]:
        with self.context.autocast():
            return sample(
                self.policy,
                self.tokenizer,
                self.prompts,
                places,
                self.config,
                num_samples=self.config.monitor.num_samples,
                step=LOOKING,
            )

    def _scores(
        self, texts: Sequence[str], answers: Sequence[str], examples: Sequence[Example]
    ) -> list[float]:
        """The judge's mean for each prompt."""
        if self.judge is None:
            return []
        scores = self.judge(texts, answers, examples).reshape(-1, self.config.monitor.num_samples).mean(1)
        return [float(score) for score in scores]


def _judge(config: RSConfig | PPOConfig | DPOConfig, context: Context, tokenizer: Tokenizer) -> Judge | None:
    if config.monitor.judge not in JUDGES:
        context.check_same_tokens("judge", tokenizer)
        model = load_reward_model(context, tokenizer, config.micro_batch_size, "judge")
        return lambda texts, answers, examples: model(examples)
    # A collect stage samples responses to prompts of the embedded world.
    if config.monitor.judge != "none" and context.task.data["data"].kind in (TOY, "collect"):
        return lambda texts, answers, examples: gold_scores(texts, answers)["overall"]
    return None
