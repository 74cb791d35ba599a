"""Data sets of the Hugging Face hub: id -> its commit and its rows, from the cache when offline."""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from alignpipe.data.lines import Row
from alignpipe.errors import DataError, MachineError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `owner/data`."""
    return HUB_ID.fullmatch(name) is not None


@lru_cache(maxsize=32)
def resolve_commit(name: str, revision: str | None) -> str:
    """Returns the commit that a revision stands for now; offline, the one that the cache holds for it.

    Raises:
        DataError: The hub knows no such data set.
        MachineError: There is neither network nor cache.
    """
    # Half a second to import, and only hub data need it.
    from huggingface_hub import HfApi, constants, errors  # noqa: PLC0415

    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise DataError(
            f"{name}@{revision or 'main'}: the hub has no such data set, or it is private"
        ) from error
    except (errors.HfHubHTTPError, OSError) as error:
        cached = (
            Path(constants.HF_HUB_CACHE)
            / f"datasets--{name.replace('/', '--')}"
            / "refs"
            / (revision or "main")
        )
        if cached.is_file():
            return cached.read_text(encoding="utf-8").strip()
        raise _unreachable(name) from error


def read_hub(name: str, split: str, revision: str | None) -> Iterator[Row]:
    """Yields the rows of one split; `line` is the row's number.

    Raises:
        DataError: The data set has no such split, or cannot be read as one.
        MachineError: There is neither network nor cache.
    """
    for number, values in enumerate(_load(name, split, resolve_commit(name, revision)), 1):
        yield Row(number, dict(values))


@lru_cache(maxsize=2)
def _load(name: str, split: str, commit: str) -> Any:
    # Seconds to import, and only hub data need it.
    import datasets  # noqa: PLC0415

    try:
        return datasets.load_dataset(name, split=split, revision=commit)
    except ConnectionError as error:
        raise _unreachable(name) from error
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(
            f"{name}: split {split!r} cannot be read: {reason}; set data.split or data.revision"
        ) from error


def _unreachable(name: str) -> MachineError:
    return MachineError(
        f"{name}: the hub cannot be reached and its cache has no such data set; give a local file, or fetch "
        "it once "
        f"with network: hf download --repo-type dataset {name}"
    )
