"""What a user's YAML files say besides their values: lines, comments, and faults that OmegaConf lets pass.

OmegaConf drops line numbers and comments, reads `no` as False and `010` as 8, so files are read again here.
Folder of YAML files -> one error that names file:line, or nothing; key -> comment.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from alignpipe.errors import ConfigError

MAX_NODES = 10_000
MAX_BYTES = 1_000_000
# Keys by which Hydra calls what a file names, or looks for more files in packages.
CODE_KEYS = (
    "_target_",
    "_partial_",
    "_recursive_",
    "_convert_",
    "_args_",
    "callbacks",
    "custom_search_space",
    "env_set",
    "searchpath",
)
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {
    _TAG + name for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge", "timestamp")
}


@dataclass(frozen=True)
class KeyLine:
    """One key of a YAML file.

    Attributes:
        key: dotted, from the top of the file.
        line: counted from 1.
        comment: the lines of comment right above it, joined.
    """

    key: str
    line: int
    comment: str


def yaml_files(folder: Path, groups: list[str]) -> list[Path]:
    """The files of a configuration folder: those at its top called config.yaml and those of its groups."""
    inside = [path for group in groups for path in sorted((folder / group).rglob("*.yaml"))]
    return [*(path for path in [folder / "config.yaml"] if path.is_file()), *inside]


def check_file(path: Path) -> None:
    """Refuse a YAML file that cannot be read, or that would be read as something else than it says.

    Raises:
        ConfigError: with file:line and what to write instead.
    """
    try:
        _check_tree(_tree(path), path)
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deep to be read; write it flat") from error


def _check_tree(node: yaml.Node | None, path: Path) -> None:
    if not isinstance(node, yaml.MappingNode):
        what = (
            "is empty; write `key: value` lines into it, or remove it"
            if node is None
            else "must hold `key: value` lines at its top, not a list or a single value"
        )
        raise ConfigError(f"{path}: {what}")
    if _size(node, path, {}, set()) > MAX_NODES:
        raise ConfigError(
            f"{path}: more than {MAX_NODES} values once its anchors are unfolded; write it without anchors"
        )
    _check_node(node, path)


def key_lines(path: Path) -> list[KeyLine]:
    """Every key of a YAML file with its line and the comment above it."""
    node = _tree(path)
    text = path.read_text(encoding="utf-8").splitlines()
    return [KeyLine(key, line, _comment_above(text, line)) for key, line in _keys(node, "")]


def find_key(paths: list[Path], key: str) -> tuple[Path, int] | None:
    """File and line that set a dotted key, also where a file names only its end; None if none does."""
    parts = key.split(".")
    for start in range(len(parts)):
        wanted = ".".join(parts[start:])
        for path in paths:
            for found in key_lines(path):
                if found.key == wanted:
                    return path, found.line
    return None


def _tree(path: Path) -> yaml.Node | None:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ConfigError(
                f"{path}: more than {MAX_BYTES:,} bytes; no configuration is so long, is it data?"
            )
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{path}{at}: not YAML: {error.problem}; indent with spaces and close every bracket"
        ) from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return node


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


def _size(node: yaml.Node, path: Path, sizes: dict[int, int], open_nodes: set[int]) -> int:
    """Nodes below and with this one, each anchor counted as often as it is used."""
    if id(node) in open_nodes:
        raise ConfigError(
            f"{path}:{node.start_mark.line + 1}: an anchor that holds itself; write it without anchors"
        )
    if id(node) not in sizes:
        open_nodes.add(id(node))
        sizes[id(node)] = 1 + sum(_size(child, path, sizes, open_nodes) for child in _children(node))
        open_nodes.discard(id(node))
    return sizes[id(node)]


def _check_node(node: yaml.Node, path: Path) -> None:
    at = f"{path}:{node.start_mark.line + 1}"
    if node.tag not in _PLAIN_TAGS:
        raise ConfigError(f"{at}: the tag {node.tag.removeprefix(_TAG)!r} is refused; write a plain value")
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, at)
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, path)
    for child in _children(node):
        _check_node(child, path)


def _check_scalar(node: yaml.ScalarNode, at: str) -> None:
    if node.tag == f"{_TAG}bool" and node.value.lower() not in ("true", "false"):
        raise ConfigError(f"{at}: YAML reads {node.value} as a truth value; quote it: '{node.value}'")
    if node.tag == f"{_TAG}int" and re.fullmatch(r"[-+]?(0[0-7_]+|\d+(:\d+)+)", node.value):
        raise ConfigError(
            f"{at}: YAML reads {node.value} as another number; quote it, or drop leading 0 and colon"
        )


def _check_keys(node: yaml.MappingNode, path: Path) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        name = str(key.value)
        if name in CODE_KEYS:
            raise ConfigError(
                f"{path}:{line}: {name} is refused, no configuration names code to run; stages are chosen by kind"
            )
        if name in seen and key.tag != f"{_TAG}merge":
            raise ConfigError(
                f"{path}:{line}: the key {name!r} stands in line {seen[name]} already; keep one of them"
            )
        seen[name] = line


def _keys(node: yaml.Node | None, above: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{above}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _keys(value, f"{name}.")


def _comment_above(text: list[str], line: int) -> str:
    comment: list[str] = []
    for above in reversed(text[: line - 1]):
        if not above.lstrip().startswith("#") or above.startswith("# @package"):
            break
        comment.insert(0, above.lstrip("# ").rstrip())
    return " ".join(comment)
