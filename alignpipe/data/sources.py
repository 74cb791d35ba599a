"""Where records come from: the embedded world, files of any format, the hub, a collect stage -> records.

What breaks a file stops the reading with `file:line`; what spoils a row is counted and set aside, and stops
the reading only above `data.max_bad`.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignpipe.config import TOY, DataConfig, semantic
from alignpipe.data.dialogue import RowFault
from alignpipe.data.embedded import read_world, world_hash
from alignpipe.data.formats import TYPES, Layout, find_layout, read_record
from alignpipe.data.hub import is_hub_id, read_hub, resolve_commit
from alignpipe.data.json_rows import read_jsonl
from alignpipe.data.lazy import Lazy
from alignpipe.data.lines import WHOLE, Row, stretches
from alignpipe.data.preferences import write_rankings
from alignpipe.data.records import RECORD_TYPES, RecordType, prompt_text
from alignpipe.data.row_index import Lines, Piece, read_index, write_index, written
from alignpipe.data.row_store import digest, entry
from alignpipe.data.rows import is_data_file, is_jsonl, read_rows
from alignpipe.data.shares import point_of, points_of
from alignpipe.errors import DataError

__all__ = [
    "COLLECT",
    "MIXTURE",
    "RANKINGS",
    "DataSource",
    "Keep",
    "RecordSet",
    "Rejected",
    "content_hash",
    "detect_format",
    "find_mixture",
    "find_source",
    "holds_world",
    "parts_of",
    "read_parts",
    "read_records",
    "readable_types",
    "write_rankings",
    "write_rejected",
]

# Kinds of source that are not read from a file of the user's as it is.
COLLECT, MIXTURE = "collect", "mixture"
# What a collect stage's folder holds.
RANKINGS = "rankings.jsonl"
_CHUNK = 1 << 20
# Raised by hand when a change of the code changes what is made of the same rows.
INDEX_VERSION = 1
# Bytes that one process reads at a time.
STRETCH = 1 << 23
# Files of fewer bytes are read again sooner than an index of them is kept.
MIN_KEPT = 1 << 20


@dataclass(frozen=True)
class DataSource:
    """A data set that exists.

    Attributes:
        kind: `toy`, `file`, `hub`, `collect`, or `mixture`: the sets of `config.mixture`.
        path: Absolute path of a file or folder; the id on the hub; `toy`; the paths of a mixture with ` + ` between.
        config: How its rows become records.
    """

    kind: str
    path: str
    config: DataConfig


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that cannot be used, and why."""

    file: str
    line: int
    reason: str


@dataclass(frozen=True, slots=True)
class RecordSet:
    """What a data set holds.

    Attributes:
        records: Usable rows in order.
        rejected: The others.
        num_rows: Of both together.
        format: How rows were read; `toy` for the embedded world.
        places: For each record, `file:line`, or `toy:number`.
        points: (N,), where the prompt of each record falls among the shares.
    """

    records: Sequence[Any]
    rejected: list[Rejected]
    num_rows: int
    format: str
    places: Sequence[str]
    points: NDArray[np.float64] = field(compare=False)


class Keep(NamedTuple):
    """Where what was read of a data set is kept, so that it need not be read again.

    Attributes:
        root: Folder of all that is kept.
        content: Hash of what the data set holds.
    """

    root: Path
    content: str


def find_source(name: str, config: DataConfig) -> DataSource:
    """Finds the data set that a name stands for, if it is no stage.

    Args:
        name: `toy`, a file, a folder of data files or of a collect stage, or a hub id.
        config: How its rows are to be read.

    Raises:
        DataError: There is no such file or folder, or the folder holds no data.
    """
    if name == TOY:
        return DataSource("toy", TOY, config)
    path = Path(name).expanduser().absolute()
    if path.is_dir():
        if (path / RANKINGS).is_file():
            return DataSource("collect", str(path), config)
        if not _files(path):
            raise DataError(f"{path} holds no data file; give a .jsonl, .json, .csv, .parquet or .txt file")
        return DataSource("file", str(path), config)
    if path.exists():
        return DataSource("file", str(path), config)
    # `folder/file` looks like a hub id as well; what begins with a folder that is here, or ends as data, is a
    # file.
    if is_hub_id(name) and not is_data_file(path) and not path.parent.is_dir():
        return DataSource("hub", name, config)
    raise DataError(_missing(name, path))


def find_mixture(config: DataConfig) -> DataSource:
    """Finds every data set of `config.mixture`; the paths in it become absolute.

    Raises:
        DataError: As in `find_source`.
    """
    paths = {find_source(name, config).path: weight for name, weight in config.mixture.items()}
    return DataSource(MIXTURE, " + ".join(paths), replace(config, mixture=paths))


def parts_of(source: DataSource) -> list[DataSource]:
    """Returns the data sets that a mixture is made of; any other is its own one part."""
    if source.kind != MIXTURE:
        return [source]
    return [find_source(name, source.config) for name in source.config.mixture]


def holds_world(source: DataSource) -> bool:
    """Whether the embedded world is in it, alone or among others."""
    return any(part.kind == TOY for part in parts_of(source))


def _missing(name: str, path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"no data file {path}: there is no folder {folder}; give {TOY}, a file or a hub id"
    siblings = sorted(entry.name for entry in folder.iterdir() if is_data_file(entry))
    close = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.3)
    mend = f"did you mean {Path(name).parent / close[0]}?" if close else f"give {TOY}, a file or a hub id"
    return f"no data file {path}; {mend}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and is_data_file(path))


def _paths(source: DataSource) -> list[Path]:
    path = Path(source.path)
    if source.kind == "collect":
        return [path / RANKINGS]
    return _files(path) if path.is_dir() else [path]


def content_hash(source: DataSource, hash_file: Callable[[Path], str] | None = None) -> str:
    """Returns a sha256 of what a data set holds, or the commit of one on the hub; of a mixture with its weights.

    Args:
        source: The data set. Of the embedded world, the code and the world's own settings count; the labelers
            do not, since only rankings depend on them.
        hash_file: sha256 of a file, if the caller remembers them.

    Raises:
        DataError: A file cannot be read.
        MachineError: The hub cannot be reached.
    """
    if source.kind == MIXTURE:
        weights = source.config.mixture.values()
        hashes = [content_hash(part, hash_file) for part in parts_of(source)]
        return _digest([[content, weight] for content, weight in zip(hashes, weights, strict=True)])
    if source.kind == "hub":
        return resolve_commit(source.path, source.config.revision)
    if source.kind == "toy":
        return _digest([world_hash(), semantic(source.config.world)])
    hash_file = hash_file or _hash_file
    paths = _paths(source)
    try:
        return (
            hash_file(paths[0])
            if len(paths) == 1
            else _digest([[path.name, hash_file(path)] for path in paths])
        )
    except OSError as error:
        raise DataError(
            f"{source.path} cannot be read: {error.strerror}; check its name and permissions"
        ) from error


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def rows_of(source: DataSource) -> Iterator[tuple[str, Row]]:
    """Yields the rows of a file, hub or collect source, each with the name of its file.

    Raises:
        DataError: As in `read_rows`.
        MachineError: The hub cannot be reached.
    """
    if source.kind == "hub":
        for row in read_hub(source.path, source.config.split, source.config.revision):
            yield source.path, row
        return
    for path in _paths(source):
        for row in read_rows(path):
            yield str(path), row


def layout_of(source: DataSource) -> Layout:
    """Finds how the rows of a file, hub or collect source are read, from the first that can be.

    Raises:
        DataError: No row can be read, or columns that are needed are not there.
    """
    wanted = "ranked" if source.kind == "collect" else source.config.format
    for file, row in rows_of(source):
        if row.fault is None:
            return find_layout(row.values, wanted, source.config.columns, f"{file}:{row.line}")
    raise DataError(f"{source.path} has no row that can be read; expected JSON objects, one a line")


def detect_format(source: DataSource) -> str:
    """Returns the format of a data set: `data.format`, or what its columns say; `toy` for the embedded world.

    A mixture with Alpaca rows counts as Alpaca's, since their template has to hold for all.

    Raises:
        DataError: As in `layout_of`.
    """
    found = {TOY if part.kind == TOY else layout_of(part).format for part in parts_of(source)}
    return "alpaca" if "alpaca" in found else min(found)


def readable_types(source: DataSource) -> frozenset[RecordType]:
    """Returns the types of record that a data set can serve; of a mixture, those that all its parts can.

    Raises:
        DataError: As in `layout_of`.
    """
    parts = parts_of(source)
    world = frozenset(RECORD_TYPES) - {"unpaired"}
    types = [world if one.kind == TOY else TYPES[layout_of(one).format] for one in parts]
    return frozenset.intersection(*types)


def read_parts(source: DataSource, want: RecordType, keep: Keep | None = None) -> list[RecordSet]:
    """Reads each part of a data set as `read_records` does."""
    return [
        read_records(part, want, keep and Keep(keep.root, f"{keep.content}/{number}"))
        for number, part in enumerate(parts_of(source))
    ]


def read_records(source: DataSource, want: RecordType, keep: Keep | None = None) -> RecordSet:
    """Reads a data set as records of one type.

    Args:
        source: The data set, no mixture.
        want: The type; see `readable_types`.
        keep: Where to keep what was read of a large one; None to keep nothing.

    Raises:
        ConfigError: The embedded world cannot be made as configured.
        DataError: The data set holds no such records, a file is broken, or more than `data.max_bad` of the
            rows cannot be used; names the first of them.
        MachineError: The hub cannot be reached, or the disk refuses what is kept.
    """
    if source.kind == "toy":
        world = read_world(source.config, want)
        places = [f"{TOY}:{number}" for number in range(1, len(world) + 1)]
        return RecordSet(world, [], len(world), TOY, places, points_of(world))
    layout = layout_of(source)
    if want not in TYPES[layout.format]:
        holds = ", ".join(sorted(TYPES[layout.format]))
        raise DataError(
            f"{source.path} has the format {layout.format}, which gives {holds}; {want} are wanted here: "
            "give other "
            "data, or set data.format or data.columns"
        )
    found = scan(source, layout, want, keep)
    if len(found.rejected) > source.config.max_bad * found.num_rows or not found.records:
        first = found.rejected[0]
        raise DataError(
            f"{first.file}:{first.line}: {first.reason}. {len(found.rejected)} of {found.num_rows} rows "
            "cannot be "
            f"used, more than data.max_bad={source.config.max_bad:g} allows; mend them or raise data.max_bad"
        )
    return found


def scan(source: DataSource, layout: Layout, want: RecordType, keep: Keep | None = None) -> RecordSet:
    """Reads all rows, however many of them are bad; records are made again whenever they are asked for.

    Raises:
        DataError: A file is broken.
    """
    config, files = source.config, [source.path] if source.kind == "hub" else list(map(str, _paths(source)))
    salt = COLLECT if source.kind == COLLECT else ""

    def read(piece: Piece) -> Iterator[Row]:
        if source.kind == "hub":
            return read_hub(source.path, config.split, config.revision)
        path = Path(files[piece.file])
        return read_rows(path) if piece.stretch == WHOLE else read_jsonl(path, piece.stretch)

    def judge(row: Row) -> float | str:
        try:
            if row.fault is not None:
                raise RowFault(row.fault)
            return point_of(prompt_text(read_record(row.values, layout, want)), salt)
        except RowFault as fault:
            return str(fault)

    def build(folder: Path) -> None:
        write_index(_pieces(source), len(files), read, judge, config.max_rows, folder)

    small = source.kind != "hub" and sum(path.stat().st_size for path in _paths(source)) < MIN_KEPT
    root, content = (None, "") if keep is None or small else keep
    key = digest(INDEX_VERSION, content, source.kind, config.split, asdict(layout), want, config.max_rows)
    with entry(root, key, build) as folder:
        index, unusable = read_index(folder)
        copies = [written(folder, number) for number in range(len(files))]
        values = Lines([*map(Path, files), *copies], index["file"], index["offset"], index["size"])
    numbers = np.arange(len(index))
    places = index["file"] % len(files), index["line"]
    return RecordSet(
        Lazy(lambda number: read_record(values(number), layout, want), numbers, key if root else "", root),
        [Rejected(files[row.file], row.line, row.reason) for row in unusable],
        len(index) + len(unusable),
        layout.format,
        Lazy(lambda number: f"{files[places[0][number]]}:{places[1][number]}", numbers),
        index["point"],
    )


def _pieces(source: DataSource) -> list[Piece]:
    """What processes read one at a time: stretches of large JSONL, whole files of any other form."""
    if source.kind == "hub":
        return [Piece(0)]
    pieces = []
    for number, path in enumerate(_paths(source)):
        cut = is_jsonl(path) and path.stat().st_size > STRETCH and source.config.max_rows is None
        pieces += [Piece(number, one) for one in (stretches(path, STRETCH) if cut else [WHOLE])]
    return pieces


def write_rejected(rejected: Sequence[Rejected], path: Path) -> None:
    """Writes the rows that were set aside, one JSON object with file, line and reason a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rejected]
    path.write_bytes("".join(lines).encode("utf-8", "backslashreplace"))
