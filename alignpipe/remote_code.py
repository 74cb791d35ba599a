"""Would opening a model folder run code that came with it? Asked of its JSON, before the first stage of a chain.

folder, whether the user trusts its code by name -> nothing, or CheckpointError
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignpipe.errors import CheckpointError

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
# The key that transformers asks `trust_remote_code` for; a user may allow it.
AUTO_MAP = "auto_map"
# Keys that transformers sets itself; in a file they made it fetch kernels and run them (CVE-2026-4372).
INTERNAL = ("_attn_implementation_internal", "_experts_implementation_internal")
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def check_code(folder: Path, *, trusted: bool = False) -> None:
    """Make sure that opening a model runs nobody's code but that of the libraries.

    Args:
        folder: as written by `save_pretrained`; a file that is not there says nothing.
        trusted: the user said so of this very model, see `model.trust_remote_code`.

    Raises:
        CheckpointError: a file names code, or is no JSON object.
    """
    for path in (folder / CONFIG, folder / ADAPTER):
        if not path.is_file():
            continue
        values = read_object(path)
        for key, value in _entries(values):
            if key == AUTO_MAP and not trusted:
                raise CheckpointError(
                    f"{path}: auto_map asks for code that comes with the model, which is never run; remove it if "
                    f"transformers knows the model_type, or read the code and say model.trust_remote_code=NAME"
                )
            named = key.lstrip("_") in IMPLEMENTATIONS and "/" in json.dumps(value)
            if key in INTERNAL or named:
                raise CheckpointError(f"{path}: {key} can name code to be fetched and run; remove the key")
        if path.name == ADAPTER and values.get("peft_type") != "LORA":
            raise CheckpointError(
                f"{path}: peft_type is {str(values.get('peft_type'))[:20]}, only LORA is opened; merge the adapter"
            )


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a model folder.

    Raises:
        CheckpointError: it holds none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); copy the model again") from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path}: expected a JSON object, found {type(value).__name__}; copy the model again"
        )
    return value


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a tree with what stands under it."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield str(key), item
        if isinstance(item, dict | list):
            yield from _entries(item)
