"""`alignpipe config search`: a word -> the keys that hold it, each with value, meaning and file."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from alignpipe.compose.composition import Composed, UserFolder, built_in_folder
from alignpipe.compose.yaml_files import key_lines


@dataclass(frozen=True)
class FoundKey:
    """One key of the configuration.

    Attributes:
        key: as it is written on the command line.
        value: in force.
        comment: the sentence above it in its file.
        file: relative to the configuration folder; empty for a key that only the schema knows.
    """

    key: str
    value: Any
    comment: str
    file: str


def search(word: str, composed: Composed) -> list[FoundKey]:
    """Keys whose name or meaning holds a word, those whose name holds it first."""
    origins = _origins(composed)
    found = []
    for key, value in _leaves(asdict(composed.config), ""):
        comment, file = _origin(key, origins)
        if word.lower() in key.lower() or word.lower() in comment.lower():
            found.append(FoundKey(key, value, comment, file))
    return sorted(found, key=lambda item: word.lower() not in item.key.lower())


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _origins(composed: Composed) -> dict[str, tuple[str, str]]:
    """Key -> its comment and file, for every key of every file that was chosen."""
    origins: dict[str, tuple[str, str]] = {}
    roots = [root for root in (built_in_folder(), UserFolder.folder) if root is not None]
    for root in roots:
        files = [("", root / "config.yaml")]
        for choice, option in composed.choices.items():
            group, _, package = choice.partition("@")
            if not group.startswith("hydra"):
                # A file may say no more than how it differs from another of its group, which comes first.
                files += [(package or group, path) for path in _family(root / group, option)]
        for package, path in files:
            for line in key_lines(path) if path.is_file() else []:
                placed = line.key if package in ("", "pipeline", "experiment") else f"{package}.{line.key}"
                if line.comment or placed not in origins:
                    origins[placed] = (line.comment, path.relative_to(root).as_posix())
    return origins


def _family(folder: Path, option: str) -> list[Path]:
    chosen = folder / f"{option}.yaml"
    same_package = folder.name in ("model", "data")
    others = sorted(folder.glob("*.yaml")) if same_package else []
    return [*(path for path in others if path != chosen), chosen]


def _origin(key: str, origins: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """A stage's `data` has the meaning of the root's, and stands in its file."""
    if key not in origins:
        # A copy that rounds made is written down where the stage is that they repeat.
        key = re.sub(r"^(stages\.[^.]+)_\d+\.", r"\1.", key)
    if key in origins and origins[key][0]:
        return origins[key]
    for section in (".data.", ".demonstrations.", ".ptx_data."):
        if section in key:
            return origins.get(f"data.{key.split(section, 1)[1]}", ("", ""))
    return origins.get(key, ("", ""))
