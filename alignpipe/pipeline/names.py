"""What a name of a configuration stands for: weights or rows, and where they lie.

A name is, in this order, `base`, a stage of this pipeline, a stage of a run (`RUN/stage`, `latest/stage`), a local
folder, a hub id. Whatever else it is, is an error with the nearest name.
"""

from collections.abc import Callable
from pathlib import Path

from omegaconf import MISSING

from alignpipe.artifact import POLICY_KINDS
from alignpipe.config import BASE, JUDGES, LATEST, TINY, Config, DataConfig
from alignpipe.data.hub import is_hub_id
from alignpipe.data.records import RecordType
from alignpipe.data.sources import DataSource, find_mixture, find_source, holds_world, readable_types
from alignpipe.errors import CheckpointError, ConfigError, DataError, did_you_mean
from alignpipe.pipeline.graph import JUDGE, ROWS, SHARE, is_scorer, stages_of
from alignpipe.pipeline.hub import model_folder, resolve_revision
from alignpipe.pipeline.references import (
    DataRef,
    ModelRef,
    find_run_stage,
    folder_reference,
    is_scalar,
    is_trusted,
    newest_stages,
)
from alignpipe.pipeline.store import Store, run_stages
from alignpipe.remote_code import check_code


class Names:
    """The names of one configuration.

    Args:
        config: of the run.
        store: where finished stages lie.
        bare: model folders may hold no weights, which is enough to plan.
        on_outside: told key and name whenever a name is a stage that is not in the order.

    Attributes:
        config: of the run.
        store: where finished stages lie.
        stages: by name.
        order: names of those that run.
    """

    def __init__(
        self, config: Config, store: Store, bare: bool, on_outside: Callable[[str, str], None]
    ) -> None:
        self.config = config
        self.store = store
        self.stages, self.order = stages_of(config)
        self._bare = bare
        self._on_outside = on_outside
        self._alone = config.stage is not None

    def key(self, stage: str, key: str) -> str:
        """A key of a stage as a user writes it."""
        return f"stage.{key}" if self._alone else f"stages.{stage}.{key}"

    def model(self, stage: str, role: str, label: str, at: str | None = None) -> ModelRef:
        """The weights, or the rows, of a role.

        Args:
            stage: that reads them.
            role: in it.
            label: their name.
            at: the key that names them, where that is not the role.

        Raises:
            ConfigError: the name is missing or means nothing, comes later in the order, or is of the wrong kind.
            CheckpointError: a folder holds no model, or one of the wrong kind.
        """
        key = self.key(stage, at or role)
        if label == MISSING:
            raise ConfigError(f"{key}: is not given; {self._offer(role)}")
        if label == BASE:
            ref = self._base()
        elif self._is_stage(stage, label):
            ref = self._own_stage(stage, key, label)
        elif (found := find_run_stage(self.store, label)) is not None:
            kind, stage_key = found
            ref = ModelRef(label, str(self.store.stage(kind, stage_key)), kind=kind, key=stage_key)
        elif (Path(label).is_dir()) or label.startswith((".", "/", "~")):
            ref = folder_reference(label, bare=self._bare)
        elif is_hub_id(label):
            ref = ModelRef(label, label, resolve_revision(label, None))
        else:
            known = [
                *(JUDGES if role == JUDGE else (BASE,)),
                *self.stages,
                *(f"{LATEST}/{name}" for name in newest_stages(self.store)),
            ]
            raise ConfigError(
                f"{key}: {label!r} is no stage, run, folder or hub id. {did_you_mean(label, known)}"
            )
        if ref.stage is None and ref.path != TINY:
            trusted = is_trusted(ref, self.config.model.trust_remote_code)
            check_code(model_folder(ref.path, ref.revision), trusted=trusted)
        _check_kind(ref, role, key)
        return ref

    def data(self, stage: str, config: DataConfig, wanted: tuple[RecordType, ...]) -> DataRef:
        """The rows that a stage reads first.

        Args:
            stage: that reads them.
            config: of the data set.
            wanted: types of record, one of which it must hold.

        Raises:
            ConfigError: the name is a stage that makes no data, or that comes later in the order.
            DataError: there is no such data set, or it holds none of the types.
        """
        key, name = self.key(stage, "data.path"), config.path
        if self._is_stage(stage, name):
            _check_makes_data(key, name, self.stages[name].kind)
            self._own_stage(stage, key, name)
            return DataRef(name, config, None, "train", name)
        if (found := find_run_stage(self.store, name)) is not None:
            kind, stage_key = found
            _check_makes_data(key, name, kind)
            source = DataSource("collect", str(self.store.stage(kind, stage_key)), config)
            return DataRef(name, config, source, "train")
        source = find_mixture(config) if config.mixture else find_source(name, config)
        types = readable_types(source)
        if not any(want in types for want in wanted):
            raise DataError(
                f"{key}: {source.path} holds {' and '.join(sorted(types)) or 'no type of rows in common'}; "
                f"stage {stage} needs {' or '.join(wanted)}; "
                f"give it other data, or name its columns with data.columns"
            )
        return DataRef(source.path if config.mixture else name, config, source, self._share(stage, source))

    def shares_reading(self, data: DataConfig) -> set[str]:
        """Shares of the stages that read one of the same sets."""
        names = _set_names(data)
        kinds = {self.stages[name].kind for name in self.order if names & _set_names(self.stages[name].data)}
        return {SHARE[kind] for kind in kinds if kind in SHARE}

    def _is_stage(self, stage: str, label: str) -> bool:
        """Whether a stage means one of this pipeline by a name; one that runs alone cannot mean itself."""
        return label in self.stages and not (self._alone and label == stage)

    def _base(self) -> ModelRef:
        path = self.config.model.path
        if path == TINY:
            return ModelRef(BASE, TINY)
        if Path(path).is_dir() or not is_hub_id(path):
            ref = folder_reference(path, bare=self._bare)
            return ModelRef(BASE, ref.path, kind=ref.kind, key=ref.key)
        return ModelRef(BASE, path, resolve_revision(path, self.config.model.revision))

    def _own_stage(self, stage: str, key: str, label: str) -> ModelRef:
        if label not in self.order:
            self._on_outside(key, label)
        elif stage in self.order and self.order.index(label) >= self.order.index(stage):
            raise ConfigError(
                f"{key}: {label} does not run before {stage}; the order is {', '.join(self.order)}"
            )
        return ModelRef(label, kind=self.stages[label].kind, stage=label)

    def _offer(self, role: str) -> str:
        wanted = "rm" if is_scorer(role) else "sft"
        for run in self.store.runs():
            for stage in run_stages(run):
                if stage["kind"] == wanted and self.store.find(stage["kind"], stage["key"]) is not None:
                    return f"the newest that fits is {run.name}/{stage['name']}"
        return f"train one first: alignpipe run stage={wanted}"

    def _share(self, stage: str, source: DataSource) -> str:
        """The part of a data set that a stage may see.

        A file that only one share of the run reads is used whole, but for the evaluation share; the embedded world
        is endless and always split.
        """
        own = SHARE.get(self.stages[stage].kind, "eval")
        if own == "eval" or holds_world(source):
            return own
        return "train" if len(self.shares_reading(self.stages[stage].data)) <= 1 else own


def _set_names(data: DataConfig) -> set[str]:
    """The data sets that a section names."""
    return set(data.mixture) or {data.path}


def _check_makes_data(key: str, name: str, kind: str) -> None:
    if kind != "collect":
        raise ConfigError(f"{key}: {name} is a stage of kind {kind}; only collect makes data")


def _check_kind(ref: ModelRef, role: str, key: str) -> None:
    """Refuse what a role cannot read."""
    if role in ROWS:
        _check_rows(ref, role, key)
        return
    scores = is_scorer(role)
    wanted = ("rm",) if scores else POLICY_KINDS
    if ref.kind is not None and ref.kind not in wanted:
        raised = ConfigError if ref.stage is not None else CheckpointError
        need = "a reward model (rm)" if scores else f"a policy ({', '.join(POLICY_KINDS)})"
        raise raised(f"{key}: {ref.name} is made by a stage of kind {ref.kind}; needed is {need}")
    if ref.kind is None and ref.stage is None and ref.path != TINY:
        scalar = is_scalar(model_folder(ref.path, ref.revision))
        if scalar != scores:
            held = "a classifier with a scalar head" if scalar else "a language model without a scalar head"
            wanted_model = "reward model" if scores else "policy"
            raise CheckpointError(f"{key}: {ref.name} holds {held}; needed is a {wanted_model}")


def _check_rows(ref: ModelRef, role: str, key: str) -> None:
    """Refuse what is not made by the kind of stage whose rows a role reads."""
    if ref.kind == ROWS[role]:
        return
    raised = ConfigError if ref.stage is not None or ref.name == BASE else CheckpointError
    made = "no stage" if ref.kind is None else f"a stage of kind {ref.kind}"
    raise raised(f"{key}: {ref.name} is made by {made}; needed is one of kind {ROWS[role]}")
