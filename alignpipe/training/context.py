"""What a stage works with beside its configuration: device, inputs, folders, figures, the stop signal."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.optim import Optimizer
from transformers import PreTrainedModel

from alignpipe import processes
from alignpipe.artifact import Parent, remove_tree
from alignpipe.config import SHARDED, DataConfig
from alignpipe.data.mixture import Portion, read_portion
from alignpipe.data.records import Demonstration, Prompt, Ranking, Record, RecordType, Text, Unpaired
from alignpipe.data.sources import DataSource, Keep, RecordSet, read_parts, readable_types, write_rejected
from alignpipe.data.tokenizer import Tokenizer
from alignpipe.errors import CheckpointError, NumericalError, listed
from alignpipe.models.adapters import Adapters
from alignpipe.models.compiling import compile_training
from alignpipe.models.feed_forward import keep_gate_and_up
from alignpipe.models.kernels import use_liger
from alignpipe.models.loading import ModelSource, freeze, has_own_code, load_policy
from alignpipe.models.saving import ModelKind, save_model, verify_reload
from alignpipe.models.scalar_head import load_scalar_model
from alignpipe.models.sharding import HALF, shard
from alignpipe.models.threads import fit_threads
from alignpipe.signals import StopSignal
from alignpipe.task import Task
from alignpipe.training.checkpoint import ANEW, load_newest_state, save_state
from alignpipe.training.gradients import LossScale
from alignpipe.training.journal import Journal
from alignpipe.training.metrics import MetricLog
from alignpipe.training.progress import StageProgress

REJECTED = "rejected.jsonl"
# In a state: how far the files of figures had grown.
WRITTEN = "written"
RECORD_TYPE: dict[type[Record], RecordType] = {
    Demonstration: "demonstrations",
    Ranking: "rankings",
    Unpaired: "unpaired",
    Prompt: "prompts",
    Text: "text",
}
AnyRecord = TypeVar("AnyRecord", Demonstration, Ranking, Unpaired, Prompt, Text)


@dataclass
class Context:
    """The surroundings of one stage.

    Attributes:
        task: what the stage was told.
        accelerator: device, precision and trackers.
        metrics: where figures go.
        progress: what the user sees.
        stop: whether a signal came.
        loss_scale: of float16 gradients.
        step: optimizer updates done; what training draws, it draws for a step.
        parents: the artifacts that the stage reads, by role; a state belongs to them.
        left_out: steps that were left out because a number was not finite.
    """

    task: Task
    accelerator: Accelerator
    metrics: MetricLog
    progress: StageProgress
    stop: StopSignal
    loss_scale: LossScale = field(default_factory=LossScale)
    step: int = 0
    parents: Mapping[str, Parent] = field(default_factory=dict)
    left_out: int = 0
    _warned: set[str] = field(default_factory=set)
    # A stage reads its file once, though it takes what it trains on and what it holds out from it.
    _read: dict[tuple[str, type[Record]], list[RecordSet]] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where models live."""
        device: torch.device = self.accelerator.device
        return device

    @property
    def result(self) -> Path:
        """The folder that becomes the artifact."""
        return self.task.work / "result"

    @property
    def states(self) -> Path:
        """The folder of the states to go on from."""
        return self.task.work / "states"

    def autocast(self) -> AbstractContextManager[Any]:
        """Compute in the launch's precision; weights stay float32."""
        dtype = HALF.get(self.task.launch.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)

    def saved_activations(self) -> AbstractContextManager[Any]:
        """Keep what the backward pass needs on the CPU, where the launch says so."""
        if not self.task.launch.activation_offload:
            return nullcontext()
        return save_on_cpu(pin_memory=self.device.type == "cuda")

    def stopping(self) -> bool:
        """Whether a signal came to any process; all of them ask at the same point."""
        return processes.any_of(self.stop.requested)

    def check_stop(self) -> None:
        """End here, where nothing needs saving first, if a signal came to any process.

        Raises:
            Stopped: on every process.
        """
        if self.stopping():
            self.stop.end()

    def leave_out(self, error: NumericalError, numbers: Sequence[int], limit: int) -> None:
        """Leave a step out because a number in it is not finite, if that may be done once more.

        Args:
            error: with the places of the rows in the step that it comes from.
            numbers: of the rows of the step, in the order of the data.
            limit: steps that may be left out.

        Raises:
            NumericalError: no more steps may be; it names the rows.
        """
        named = dict.fromkeys(numbers[place] for place in error.rows or range(len(numbers)))
        told = f"{self.task.name}: {error}; rows {listed(named)} of those it learns from"
        if self.left_out >= limit:
            raise NumericalError(
                f"{told}; look at them, lower learning_rate, or leave such steps out with max_left_out"
            ) from error
        self.left_out += 1
        self.progress.say(f"warning: {told}; the step is left out, {self.left_out} of {limit} that may be")

    @property
    def left_out_figures(self) -> dict[str, float]:
        """How many steps were left out, for the figures; nothing where none was."""
        return {"left_out": self.left_out} if self.left_out else {}

    def model(self, role: str) -> ModelSource:
        """Where the weights of a role lie."""
        source = self.task.models[role]
        return ModelSource(
            source.path, source.revision, self.task.architecture, self.adapters, source.trusted
        )

    @cached_property
    def adapters(self) -> Adapters | None:
        """What all roles of the stage share, where it trains adapters."""
        config = self.task.adapter
        return None if config.kind == "none" else Adapters(config, self.task.config.seed)

    def tokenizer(self, role: str) -> Tokenizer:
        """The tokenizer and chat template of a role.

        Raises:
            CheckpointError: the role's tokenizer differs from the policy's, so ids of one mean nothing to the other.
        """
        return load_tokenizer(self.model(role), self.task.chat_template)

    def load_policy(self, role: str, tokenizer: Tokenizer, *, frozen: bool = False) -> PreTrainedModel:
        """The language model of a role, placed as the launch says; `frozen` takes its gradients off."""
        model = load_policy(self.model(role), tokenizer, self.task.attn_implementation, self._loading_device)
        return self._placed(freeze(model) if frozen else model)

    def load_scalar_model(
        self,
        role: str,
        tokenizer: Tokenizer,
        *,
        seed: int | None = None,
        num_heads: int = 1,
        all_heads: bool = False,
        frozen: bool = False,
    ) -> PreTrainedModel:
        """The reward or value model of a role, placed as the launch says; arguments as `load_scalar_model`'s."""
        model = load_scalar_model(
            self.model(role),
            tokenizer,
            self.task.attn_implementation,
            self._loading_device,
            seed=seed,
            num_heads=num_heads,
            all_heads=all_heads,
        )
        return self._placed(freeze(model) if frozen else model)

    @property
    def _loading_device(self) -> torch.device:
        """Weights that will be cut over the processes are never whole on one device."""
        return torch.device("cpu") if self.task.launch.strategy in SHARDED else self.device

    def _placed(self, model: PreTrainedModel) -> PreTrainedModel:
        launch = self.task.launch
        if self.device.type == "cpu":
            fit_threads(model)
        if launch.gradient_checkpointing:
            # Older releases of transformers know it by its first name alone.
            older = model.gradient_checkpointing_enable
            getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
        if self.task.kernels == "liger":
            use_liger(model, self.device)
        if not self.task.compile:
            keep_gate_and_up(model)
        elif any(parameter.requires_grad for parameter in model.parameters()):
            compile_training(model)
        return shard(model, launch, self.device) if launch.strategy in SHARDED else model

    def check_same_tokens(self, role: str, tokenizer: Tokenizer) -> None:
        """Make sure that a second model reads the ids and the template of the first.

        Raises:
            CheckpointError: their vocabularies or templates differ.
        """
        other = self.tokenizer(role)
        if other.fingerprint != tokenizer.fingerprint:
            raise CheckpointError(
                f"{self.task.name}: {role} {self.task.models[role].name!r} has another tokenizer or chat template "
                f"than the policy; train both from the same base"
            )

    def records(
        self, role: str, config: DataConfig, want: type[AnyRecord], share: str | None = None
    ) -> Sequence[AnyRecord]:
        """The records of a data set that this stage may see.

        Args:
            role: `data` or `demonstrations`.
            config: of that data set.
            want: type of record.
            share: another share than the stage's own, such as `eval` for held-out rows.
        """
        return cast(Sequence[AnyRecord], self.portion(role, config, want, share).records)

    def portion(self, role: str, config: DataConfig, want: type[Record], share: str | None = None) -> Portion:
        """The same records, each with its place and source."""
        data = self.task.data[role]
        source = DataSource(data.kind, data.path, config)
        if (role, want) not in self._read:
            keep = Keep(self.task.rows, data.key) if data.key else None
            self._read[role, want] = read_parts(source, RECORD_TYPE[want], keep)
        found = self._read[role, want]
        rejected = [row for one in found for row in one.rejected]
        if rejected and processes.is_main():
            write_rejected(rejected, self.task.work / REJECTED)
        return read_portion(source, found, share or data.share)

    def record_types(self, role: str, config: DataConfig) -> frozenset[RecordType]:
        """The types of record that a data set can serve."""
        data = self.task.data[role]
        return readable_types(DataSource(data.kind, data.path, config))

    def journal(self, name: str) -> Journal:
        """A file of finished items, kept while the stage is under way."""
        return Journal(self.task.work / f"{name}.journal")

    def save(
        self,
        step: int,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        values: Mapping[str, Any],
    ) -> None:
        """Save a state to go on from."""
        own = {
            "step": step,
            WRITTEN: self.metrics.written(),
            "left_out": self.left_out,
            "loss_scale": [self.loss_scale.value, self.loss_scale.good_steps],
        }
        save_state(self.states, step, modules, optimizers, {**values, **own}, self.parents)

    def save_checkpoint(self, model: PreTrainedModel, tokenizer: Tokenizer, kind: ModelKind) -> None:
        """Write the model as the stage's result, and open it once more as any user would.

        Raises:
            CheckpointError: opened again it gives other outputs.
            MachineError: the disk refuses it.
        """
        adapters = self.adapters
        if adapters is not None and adapters.config.handover == "merge":
            model, adapters = self._merged(model, tokenizer, kind), None
        save_model(model, tokenizer, self.result, adapters)
        loading = {} if adapters is None else adapters.loading(self.device)
        verify_reload(model, self.result, kind, loading)

    def _merged(self, model: PreTrainedModel, tokenizer: Tokenizer, kind: ModelKind) -> PreTrainedModel:
        """Whole weights: the adapter added to the base as the files hold it, since in memory others stand on it."""
        load = load_policy if kind == "policy" else load_scalar_model
        folder = self.task.work / "adapter"
        save_model(model, tokenizer, folder, self.adapters)
        source = ModelSource(str(folder), trusted=has_own_code(model))
        whole = load(source, tokenizer, self.task.attn_implementation, self.device)
        processes.any_of(False)  # until every process has read it
        processes.from_main(lambda: remove_tree(folder))
        return whole

    def resume(
        self,
        modules: Mapping[str, nn.Module],
        optimizers: Mapping[str, Optimizer],
        names: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Go back to the newest valid state.

        Args:
            modules: as they are saved.
            optimizers: as they are saved.
            names: of the values that the stage saves.

        Returns:
            Its values; `{"step": 0}` when the stage starts afresh.

        Raises:
            CheckpointError: there are states, but none is whole and of this stage.
        """
        values = load_newest_state(self.states, modules, optimizers, self.parents, self.warn)
        if values is None:
            return {"step": 0}
        lacking = [name for name in ("step", WRITTEN, "left_out", "loss_scale", *names) if name not in values]
        if lacking:
            raise CheckpointError(f"{self.states}: the newest state has no {', '.join(lacking)}; {ANEW}")
        self.left_out = values["left_out"]
        self.loss_scale = LossScale(*values["loss_scale"])
        self.metrics.rewind(values[WRITTEN])
        return values

    def warn(self, line: str) -> None:
        """Say once what a person should look at."""
        if line not in self._warned:
            self._warned.add(line)
            self.progress.say(f"warning: {self.task.name}: {line}")


def load_tokenizer(source: ModelSource, fallback_template: str) -> Tokenizer:
    """The tokenizer that belongs to some weights."""
    return Tokenizer.toy() if source.is_tiny else Tokenizer.load(source.folder(), fallback_template)
