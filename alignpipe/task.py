"""What one stage is told: its resolved configuration, where its inputs lie, where it writes.

The process that composed the configuration writes a task to a YAML file; the process that runs the stage reads
it back into the same dataclasses, so that no other process ever sees Hydra.
"""

from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from alignpipe.artifact import write_text
from alignpipe.config import KINDS, AdapterConfig, ArchitectureConfig, LaunchConfig, StageConfig

# In a stage's working folder: made to ask its processes to stop, and where they say how they failed.
STOP = "stop"
ERRORS = "errors"
STUCK = "stuck"
# Tells a stage's processes which one started them.
LAUNCHER = "ALIGNPIPE_LAUNCHER"


@dataclass(frozen=True)
class ModelInput:
    """The weights of one role, or the stage whose rows are read.

    Attributes:
        name: how the configuration calls it: `base`, a stage, a folder, a hub id.
        path: `tiny`, a folder, or a hub id.
        revision: commit of a hub id.
        kind: kind of the stage that made it; None for weights from elsewhere.
        key: identity of the weights: a stage's key or a hash.
        trusted: the code that comes with them may run.
    """

    name: str
    path: str
    revision: str | None = None
    kind: str | None = None
    key: str = ""
    trusted: bool = False


@dataclass(frozen=True)
class DataInput:
    """One data set of a stage, and the share of its prompts that the stage may see.

    Attributes:
        kind: `toy`, `file`, `hub` or `collect`.
        path: absolute file or folder, hub id, or `toy`.
        share: one of the four shares, or `train`: all but the evaluation share.
        key: hash of the content.
    """

    kind: str
    path: str
    share: str
    key: str = ""


@dataclass(frozen=True)
class FunctionInput:
    """A function in a file of the user's, found before anything runs and run by the stage alone.

    Attributes:
        label: how the configuration calls it, `FILE.py:NAME`.
        path: absolute.
        name: at the top level of the file.
        key: sha256 of the file; a file that has changed since is not run.
    """

    label: str
    path: str
    name: str
    key: str


@dataclass
class Task:
    """Everything a stage process needs.

    Attributes:
        name: of the stage in its run.
        kind: of the stage.
        key: of the stage.
        work: folder for states and unfinished results.
        target: folder of the finished artifact.
        config: of the stage.
        models: by role; an eval's policies are `policy_0`, `policy_1`, ...
        data: by role: `data`, `demonstrations`.
        functions: of the user's own, by role: `reward`.
        chat_template: Jinja source for a model that has none.
        architecture: of the model that `tiny` names.
        attn_implementation: as transformers takes it.
        launch: devices, precision, processes.
        compile: whether forwards of training are compiled.
        kernels: of the blocks, `none` or `liger`.
        adapter: whether adapters are trained in place of whole weights.
        trackers: names of accelerate trackers.
        run: name of the run, for trackers.
        inputs: what the key was made of.
    """

    name: str
    kind: str
    key: str
    work: Path
    target: Path
    config: StageConfig
    models: dict[str, ModelInput]
    data: dict[str, DataInput]
    chat_template: str
    architecture: ArchitectureConfig
    attn_implementation: str
    launch: LaunchConfig
    adapter: AdapterConfig
    compile: bool = False
    kernels: str = "none"
    functions: dict[str, FunctionInput] = field(default_factory=dict)
    trackers: list[str] = field(default_factory=list)
    run: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def logs(self) -> Path:
        """Where processes other than the first write what they print: with the run."""
        return self.target.parents[1] / "runs" / self.run / "logs"

    @property
    def rows(self) -> Path:
        """Where rows that were read or encoded are kept for the next stage that needs them."""
        return self.target.parents[1] / "rows"

    @property
    def trackers_folder(self) -> Path:
        """Where trackers that write files do so: with the run, since the stage's own folder goes away."""
        return self.target.parents[1] / "runs" / self.run / "trackers" / self.name


def write_task(task: Task, path: Path) -> None:
    """Write a task as YAML, in one step."""
    raw = asdict(task) | {"work": str(task.work), "target": str(task.target)}
    write_text(path, yaml.safe_dump(raw, allow_unicode=True, sort_keys=False))


def read_task(path: Path) -> Task:
    """Read a task back, with the types it was written from."""
    raw: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return Task(
        **raw
        | {
            "work": Path(raw["work"]),
            "target": Path(raw["target"]),
            "config": _typed(KINDS[raw["kind"]], raw["config"]),
            "architecture": _typed(ArchitectureConfig, raw["architecture"]),
            "launch": _typed(LaunchConfig, raw["launch"]),
            "adapter": _typed(AdapterConfig, raw["adapter"]),
            "models": {role: ModelInput(**model) for role, model in raw["models"].items()},
            "data": {role: DataInput(**data) for role, data in raw["data"].items()},
            "functions": {role: FunctionInput(**found) for role, found in raw["functions"].items()},
        }
    )


def _typed(schema: type, values: dict[str, Any]) -> Any:
    # Not by OmegaConf: it would resolve `${...}` in a path that has long been resolved.
    types = get_type_hints(schema)
    return schema(
        **{
            name: _typed(types[name], value) if is_dataclass(types[name]) else value
            for name, value in values.items()
        }
    )
