"""Are the weights of a model folder whole? Asked without torch, before the first stage of a chain trains.

folder -> nothing, or CheckpointError
"""

import json
from pathlib import Path

from alignpipe.errors import CheckpointError

INDEX = "model.safetensors.index.json"
# A safetensors file begins with the length of its JSON header, as eight bytes, little-endian.
PREFIX = 8


def check_weights(folder: Path) -> None:
    """Look for every file that the index names, and compare each file's size with what its header promises.

    Raises:
        CheckpointError: there are no safetensors weights, one is missing, cut short, or no safetensors file.
    """
    if not any(folder.glob("*.safetensors*")):
        raise CheckpointError(f"{folder}: no safetensors weights in it; write it again with save_pretrained")
    for name in sorted(_indexed(folder)):
        if Path(name).name != name:
            raise CheckpointError(f"{folder / INDEX}: shard {name!r} lies outside of the folder; remove it")
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name}: missing, though the index names it; copy the model again"
            )
    for path in sorted(folder.glob("*.safetensors")):
        try:
            promised = _promised(path)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: cut short or damaged ({error}); copy the model again") from error
        size = path.stat().st_size
        if size != promised:
            raise CheckpointError(
                f"{path}: cut short or damaged ({size} bytes, its header promises {promised}); "
                f"copy the model again"
            )


def _indexed(folder: Path) -> set[str]:
    path = folder / INDEX
    if not path.is_file():
        return set()
    try:
        return set(map(str, json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: no index of weights ({error}); copy the model again") from error


def _promised(path: Path) -> int:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(PREFIX), "little")
        if length > path.stat().st_size:
            raise ValueError("its header is not whole")
        header = json.loads(file.read(length))
    ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    return PREFIX + length + max(ends, default=0)
