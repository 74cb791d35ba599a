"""Splits prompts once, by a hash of their text: prompt text -> `eval`, `sft`, `preference` or `rl`.

No list of indices is kept: the same prompt falls into the same share in every file, stage and run, so that no
stage can meet a prompt of the evaluation.
"""

import hashlib
from collections.abc import Sequence
from typing import Literal, TypeVar, cast

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
    digest = hashlib.sha256(f"{salt}|{' '.join(text.split())}".encode("utf-8", "surrogatepass")).digest()
    # 52 bits make a number in [0, 1) without rounding.
    point = (int.from_bytes(digest[:8]) >> 12) / 2**52
    fractions = {"eval": shares.eval, "sft": shares.sft, "preference": shares.preference, "rl": shares.rl}
    edge = 0.0
    for name in _ORDER:
        edge += fractions[name]
        if point < edge:
            return cast(Share, name)
    # The sum may be a hair below 1; the last share that has a fraction takes the rest.
    return cast(Share, [name for name in _ORDER if fractions[name] > 0][-1])


def in_share(
    records: Sequence[AnyRecord], share: str, shares: SharesConfig, salt: str = ""
) -> list[AnyRecord]:
    """Returns the records of one share, in order; as `indices_in_share`."""
    return [records[index] for index in indices_in_share(records, share, shares, salt)]


def indices_in_share(
    records: Sequence[Record], share: str, shares: SharesConfig, salt: str = ""
) -> list[int]:
    """Returns which records belong to one share, in order.

    Args:
        records: Any records.
        share: One of the four, `train` for all but `eval`, or `all`.
        shares: Fractions that add up to 1.
        salt: As in `share_of`.

    Raises:
        ConfigError: There is no such share.
    """
    if share == "all":
        return list(range(len(records)))
    if share not in (*SHARES, "train"):
        raise ConfigError(f"there is no share {share!r}. {did_you_mean(share, (*SHARES, 'train', 'all'))}")
    wanted = set(SHARES) - {"eval"} if share == "train" else {share}
    return [
        index for index, record in enumerate(records) if share_of(prompt_text(record), shares, salt) in wanted
    ]
