"""What a stage leaves behind: a folder with a manifest, written so that a crash leaves all of it or nothing.

Durable order: files -> hashes -> fsync each -> manifest last -> rename the folder -> fsync its parent. A reader
trusts only a folder whose manifest is there and agrees with its files.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from alignpipe.disk import refusal
from alignpipe.errors import CheckpointError, ConfigError, MachineError

MANIFEST = "alignpipe.json"
# 2 has a hash of the manifest itself.
FORMAT = 2
OWN_HASH = "sha256"
POLICY_KINDS = ("sft", "rs", "ppo", "dpo")


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and sha256 of one file of an artifact."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Parent:
    """An artifact that a stage read: its key, and the digest over its files as they were then."""

    key: str
    digest: str


@dataclass
class Manifest:
    """The contents of `alignpipe.json`.

    Attributes:
        kind: kind of the stage that made the folder.
        key: key of the stage; the folder is named after both.
        parents: what it read, by role.
        inputs: everything the key was made of, so that a changed key can be explained.
        metrics: the stage's last figures.
        files: every file of the folder but this one.
        versions: of the packages that made it, and the thread count; recorded, not part of the key.
        format: of this file.
    """

    kind: str
    key: str
    parents: dict[str, Parent] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    files: dict[str, FileEntry] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """One hash over all files, the identity of what the folder holds."""
        listing = json.dumps({name: entry.sha256 for name, entry in sorted(self.files.items())})
        return hashlib.sha256(listing.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Hash of a file's bytes, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_link(folder: Path) -> None:
    """Make sure that what is written into a folder lands in it.

    Raises:
        ConfigError: it is a link to another.
    """
    if folder.is_symlink():
        raise ConfigError(
            f"{folder}: is a link to {folder.readlink()}, and nothing is written through it; remove it"
        )


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step: readers see the old text or the new one, whole.

    Raises:
        MachineError: the disk refuses it.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a text file in one step, durably.

    Raises:
        MachineError: the disk refuses it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise refusal(path, error, len(text.encode())) from error


def sync_folder(folder: Path) -> None:
    """Make renames and new names in a folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, durably; one that is there is let be.

    Raises:
        MachineError: the disk refuses it.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync_folder(path.parent)
    except OSError as error:
        raise refusal(folder, error) from error


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Hash and fsync every file below a folder, but for the manifest, and fsync the folders they lie in."""
    entries = {}
    for path in _files(folder):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        entries[path.relative_to(folder).as_posix()] = FileEntry(path.stat().st_size, digest)
    for path in folder.rglob("*/"):
        sync_folder(path)
    return entries


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Hash the files of a folder into its manifest and write that last.

    Returns:
        The manifest with files and versions filled in.
    """
    manifest.files = file_entries(folder)
    manifest.versions = manifest.versions or installed_versions()
    raw = asdict(manifest)
    write_json(folder / MANIFEST, raw | {OWN_HASH: _hash(raw)})
    return manifest


def publish(folder: Path, final: Path) -> None:
    """Rename a sealed folder to where readers look for it, durably.

    Raises:
        MachineError: the rename is refused.
    """
    make_folder(final.parent)
    try:
        folder.rename(final)
    except OSError as error:
        raise MachineError(
            f"{final}: cannot be made ({error.strerror}); is another run writing it?"
        ) from error
    sync_folder(final.parent)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None where there is none.

    Raises:
        CheckpointError: it is there but cannot be read, or comes from a newer alignpipe.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format"] > FORMAT:
            raise CheckpointError(
                f"{path}: format {raw['format']} is newer than this alignpipe reads ({FORMAT}); update it"
            )
        if raw.pop(OWN_HASH, None) != _hash(raw) and raw["format"] != 1:
            raise ValueError("its content changed since it was written")
        raw["files"] = {name: FileEntry(**entry) for name, entry in raw["files"].items()}
        raw["parents"] = {role: Parent(**parent) for role, parent in raw["parents"].items()}
        return Manifest(**raw)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a manifest ({error}); move the folder away and run the stage again"
        ) from error


def damage(folder: Path, manifest: Manifest, *, read_files: bool) -> str | None:
    """What is wrong with a folder in the light of its manifest, or None.

    Args:
        folder: the artifact.
        manifest: its manifest.
        read_files: compare hashes too, not sizes alone.
    """
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{path}: missing"
        if path.stat().st_size != entry.size:
            return f"{path}: has {path.stat().st_size} bytes, {entry.size} were written"
        if read_files and sha256_file(path) != entry.sha256:
            return f"{path}: its content changed since it was written"
    return None


def verify(folder: Path) -> Manifest:
    """Read a whole artifact and compare it with its manifest.

    Raises:
        CheckpointError: a file is missing or damaged, or there is no manifest.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise CheckpointError(f"{folder}: no {MANIFEST} in it, so it was never finished; run its stage again")
    found = damage(folder, manifest, read_files=True)
    if found is not None:
        raise CheckpointError(f"{found}; move the folder away and run the stage again")
    return manifest


def set_aside(folder: Path, why: str) -> Path:
    """Rename a folder that is not to be used any more; nothing is deleted."""
    number = 1
    while (target := folder.with_name(f"{folder.name}.{why}-{number}")).exists():
        number += 1
    folder.rename(target)
    sync_folder(target.parent)
    return target


def remove_tree(folder: Path) -> None:
    """Delete a folder that is under way, if it is there."""
    shutil.rmtree(folder, ignore_errors=True)


def installed_versions() -> dict[str, str]:
    """Versions of what decides numbers: Python, alignpipe and the packages under it."""
    found = {"python": platform.python_version()}
    for package in ("alignpipe", "torch", "transformers", "accelerate", "tokenizers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "source"
    return found


def changed_versions(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is not as it was, such as `torch 2.11.0 -> 2.13.0`; what only one of them knows is left out."""
    return [f"{name} {then[name]} -> {now[name]}" for name in now if name in then and then[name] != now[name]]


def _hash(raw: dict[str, Any]) -> str:
    """Of a manifest without this hash, its entries in the order of the file."""
    return hashlib.sha256(json.dumps(raw).encode()).hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            yield path
