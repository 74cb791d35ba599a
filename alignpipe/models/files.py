"""Is a model folder whole and safe to open? Asked before transformers sees it, so that an error is one line.

folder -> nothing, or CheckpointError
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from alignpipe.errors import CheckpointError, did_you_mean
from alignpipe.remote_code import ADAPTER, CONFIG, check_code, read_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def check_files(folder: Path, *, trusted: bool = False) -> None:
    """Make sure that a folder holds a model that can be opened without running anybody's code.

    Args:
        folder: as written by `save_pretrained`.
        trusted: the user trusts the code that comes with it.

    Raises:
        CheckpointError: no such folder, no or broken `config.json`, code of its own, pickled weights only,
            shards that are missing or cut short.
    """
    if not folder.is_dir():
        siblings = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise CheckpointError(
            f"{folder}: there is no such folder. {did_you_mean(folder.name, siblings)}".strip()
        )
    _check_config(folder, trusted)
    for shard in _shards(folder):
        _check_shard(shard)
    if (folder / ADAPTER).is_file():
        _check_shard(folder / ADAPTER_WEIGHTS)


def _check_config(folder: Path, trusted: bool) -> None:
    if not (folder / CONFIG).is_file():
        if (folder / ADAPTER).is_file():
            raise CheckpointError(f"{folder}: an adapter without its model; merge it into the model first")
        raise CheckpointError(f"{folder}: no {CONFIG} in it; expected a folder written by save_pretrained")
    check_code(folder, trusted=trusted)
    config = read_object(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{folder / CONFIG}: no model_type in it; write it again with save_pretrained")


def _shards(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLED)
        if pickled:
            raise CheckpointError(
                f"{folder}: only pickled weights ({pickled[0]}), which can run code; convert them "
                f"where you trust them with save_pretrained of transformers, which writes {WEIGHTS}"
            )
        raise CheckpointError(f"{folder}: no weights ({WEIGHTS}) in it; was it written to the end?")
    weight_map = read_object(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX}: no weight_map of shard names in it; copy the model again")
    names = sorted(set(weight_map.values()))
    strays = [name for name in names if Path(name).name != name]
    if strays:
        raise CheckpointError(f"{folder / INDEX}: shard {strays[0]!r} lies outside of the folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} weight files missing, first {missing[0]}; "
            f"copy the model again"
        )
    return [folder / name for name in names]


def _check_shard(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cut short or damaged ({error}); copy the model again") from error
