"""What a name stands for outside of the pipeline: a stage of a run, a folder with weights.

name -> reference, or one line that says what is wrong with it
"""

from dataclasses import dataclass
from pathlib import Path

from alignpipe.artifact import read_manifest
from alignpipe.config import BASE, LATEST, DataConfig
from alignpipe.data.sources import DataSource
from alignpipe.errors import CheckpointError, ConfigError, did_you_mean
from alignpipe.pipeline.store import Store, manifest_of, run_stages
from alignpipe.pipeline.weights import check_weights
from alignpipe.remote_code import CONFIG, read_object


@dataclass(frozen=True)
class ModelRef:
    """Weights that a stage reads, or rows that another stage left.

    Attributes:
        name: as the configuration calls them.
        path: `tiny`, a folder, or a hub id; "" while they are a stage of this run.
        revision: commit of a hub id.
        kind: of the stage that made them, None for weights from elsewhere.
        key: of the stage that made them; "" where that is not known yet.
        stage: name of the stage of this run that makes them.
    """

    name: str
    path: str = ""
    revision: str | None = None
    kind: str | None = None
    key: str = ""
    stage: str | None = None


@dataclass(frozen=True)
class DataRef:
    """Rows that a stage reads.

    Attributes:
        name: as the configuration calls them.
        config: how they are read.
        source: where they lie; None while they are a stage of this run.
        share: of the prompts.
        stage: name of the collect stage of this run that makes them.
    """

    name: str
    config: DataConfig
    source: DataSource | None
    share: str
    stage: str | None = None


def find_run_stage(store: Store, label: str) -> tuple[str, str] | None:
    """Kind and key of `RUN/stage` or `latest/stage`; None when the label has not that form or no such run.

    Raises:
        ConfigError: the run has no such stage.
        CheckpointError: the stage is not finished.
    """
    run, slash, name = label.partition("/")
    if not slash or "/" in name:
        return None
    folders = (
        store.runs() if run == LATEST else [store.run(run)] if (store.run(run) / "run.json").is_file() else []
    )
    if not folders and run != LATEST:
        return None
    seen: list[str] = []
    for folder in folders:
        for stage in run_stages(folder):
            seen.append(stage["name"])
            if stage["name"] == name and store.find(stage["kind"], stage["key"]) is not None:
                return stage["kind"], stage["key"]
    if name in seen:
        raise CheckpointError(f"{label}: stage {name} is not finished; run it first")
    raise ConfigError(f"{label}: no run has a stage {name!r} yet. {did_you_mean(name, seen)}".rstrip(" ."))


def newest_stages(store: Store) -> list[str]:
    """Names of the stages of the newest run."""
    runs = store.runs()
    return [stage["name"] for stage in run_stages(runs[0])] if runs else []


def folder_reference(label: str, *, bare: bool = False) -> ModelRef:
    """The weights in a local folder, made by alignpipe or not.

    Args:
        label: the folder.
        bare: it may hold no weights at all, which is enough to plan.

    Raises:
        CheckpointError: there is no such folder, or it holds no whole model.
    """
    folder = Path(label).expanduser()
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        hint = (
            did_you_mean(folder.name, siblings)
            if siblings
            else f"{folder.parent.resolve()} is not there either"
        )
        raise CheckpointError(f"{folder.resolve()}: there is no such folder. {hint}".strip())
    manifest = manifest_of(folder)
    if manifest is not None:
        return ModelRef(label, str(folder.resolve()), kind=manifest.kind, key=manifest.key)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder.resolve()}: no config.json in it, so it is no model folder")
    if not bare or any(folder.glob("*.safetensors*")):
        check_weights(folder)
    return ModelRef(label, str(folder.resolve()))


def is_trusted(ref: ModelRef, name: str | None) -> bool:
    """Whether the code that comes with some weights may run.

    Args:
        ref: the weights.
        name: of the base model whose code the user trusts; so are stages that were made from it by the same word.
    """
    if name is None:
        return False
    if ref.stage is not None or ref.name in (BASE, name):
        return True
    manifest = None if ref.kind is None else read_manifest(Path(ref.path))
    return manifest is not None and manifest.inputs.get("trust_remote_code") == name


def is_scalar(folder: Path) -> bool:
    """Whether a folder's model has a scalar head instead of a language model's.

    Raises:
        CheckpointError: its config.json cannot be read.
    """
    architectures = read_object(folder / CONFIG).get("architectures")
    return any("SequenceClassification" in str(name) for name in architectures or ())
