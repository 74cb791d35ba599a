"""Splits prompts once, by a hash of their text: prompt text -> `eval`, `sft`, `preference` or `rl`.

No list of indices is kept: the same prompt falls into the same share in every file, stage and run, so that no
stage can meet a prompt of the evaluation.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from alignpipe.config import SHARES, SharesConfig
from alignpipe.data.records import Record, prompt_text
from alignpipe.errors import ConfigError, did_you_mean

Share = Literal["sft", "preference", "rl", "eval"]
# Evaluation comes first, so that its prompts stay the same when the other fractions change.
_ORDER = ("eval", "sft", "preference", "rl")

AnyRecord = TypeVar("AnyRecord", bound=Record)


def share_of(text: str, shares: SharesConfig, salt: str = "") -> Share:
    """Returns the share that a prompt belongs to; white space does not count.

    Args:
        text: As `prompt_text` gives it.
        shares: Fractions that add up to 1.
        salt: Another text gives another split.
    """
    return cast(Share, _ORDER[_shares_at(np.array([point_of(text, salt)]), shares)[0]])


def point_of(text: str, salt: str = "") -> float:
    """Returns where in [0, 1) a prompt stands, whatever the shares; arguments as in `share_of`."""
    digest = hashlib.sha256(f"{salt}|{' '.join(text.split())}".encode("utf-8", "surrogatepass")).digest()
    # 52 bits make a number in [0, 1) without rounding.
    return (int.from_bytes(digest[:8]) >> 12) / 2**52


def _shares_at(points: NDArray[np.float64], shares: SharesConfig) -> NDArray[np.int64]:
    """Returns for each point the number of its share in `_ORDER`."""
    fractions = [float(getattr(shares, name)) for name in _ORDER]
    # The sum may be a hair below 1; the last share that has a fraction takes the rest.
    last = max(number for number, fraction in enumerate(fractions) if fraction > 0)
    return np.minimum(np.searchsorted(np.cumsum(fractions), points, side="right"), last)


def in_share(
    records: Sequence[AnyRecord], share: str, shares: SharesConfig, salt: str = ""
) -> list[AnyRecord]:
    """Returns the records of one share, in order; as `indices_in_share`."""
    return [records[index] for index in indices_in_share(points_of(records, salt), share, shares)]


def points_of(records: Sequence[Record], salt: str = "") -> NDArray[np.float64]:
    """Returns the points of the prompts of records, (N,)."""
    return np.array([point_of(prompt_text(record), salt) for record in records], np.float64)


def indices_in_share(points: NDArray[np.float64], share: str, shares: SharesConfig) -> NDArray[np.int64]:
    """Returns which records belong to one share, in order.

    Args:
        points: (N,), of the records' prompts.
        share: One of the four, `train` for all but `eval`, or `all`.
        shares: Fractions that add up to 1.

    Raises:
        ConfigError: There is no such share.
    """
    if share == "all":
        return np.arange(len(points))
    if share not in (*SHARES, "train"):
        raise ConfigError(f"there is no share {share!r}. {did_you_mean(share, (*SHARES, 'train', 'all'))}")
    wanted = set(SHARES) - {"eval"} if share == "train" else {share}
    numbers = [number for number, name in enumerate(_ORDER) if name in wanted]
    return np.flatnonzero(np.isin(_shares_at(points, shares), numbers))
