"""Hub ids without torch: which commit a name stands for, and its small files for planning."""

import re
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from alignpipe.data.hub import is_hub_id
from alignpipe.errors import ConfigError, MachineError

COMMIT = re.compile(r"[0-9a-f]{40}")
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]


def resolve_revision(name: str, revision: str | None) -> str:
    """The commit that a revision of a model on the hub stands for now.

    Offline, or where the hub does not answer, the commit that the local cache holds for it.

    Raises:
        ConfigError: the hub knows no such repository or revision.
        MachineError: there is neither network nor cache.
    """
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    try:
        info = HfApi().model_info(name, revision=revision)
        return str(info.sha)
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{name}: the hub has no such model, or it is private and no token is set"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        folder = f"models--{name.replace('/', '--')}"
        ref = Path(HF_HUB_CACHE) / folder / "refs" / (revision or "main")
        if ref.is_file():
            return ref.read_text(encoding="utf-8").strip()
        raise MachineError(
            f"{name}: the hub cannot be reached and the cache has no such model; give a local folder, "
            f"or fetch it once with network: hf download {name}"
        ) from error


def model_folder(path: str, revision: str | None) -> Path:
    """A local folder with a model's configuration and tokenizer; for a hub id they are fetched, weights are not.

    Raises:
        MachineError: a hub id is neither cached nor reachable.
    """
    if not is_hub_id(path) or Path(path).is_dir():
        return Path(path)
    disable_progress_bars()
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=SMALL_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise MachineError(
            f"{path}: its configuration is not in the cache and the hub cannot be reached"
        ) from error
