"""Sequences on disk: numbers of rows -> each row made when it is asked for, so that memory holds the numbers alone."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, SupportsIndex, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

Item = TypeVar("Item")


class Lazy(Sequence[Item], Generic[Item]):
    """Some items of a source, in some order; equal to a list of the same items.

    Attributes:
        make: Number of an item -> the item, equal whenever it is asked for.
        numbers: (N,) int64, the items in order.
        origin: What the items come from: sources of the same origin have the same items; empty where unknown.
        home: Folder that what is made of the items may be kept in.
    """

    def __init__(
        self,
        make: Callable[[int], Item],
        numbers: NDArray[np.int64],
        origin: str = "",
        home: Path | None = None,
    ) -> None:
        self.make, self.numbers, self.origin, self.home = make, numbers, origin, home

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> "Lazy[Item]": ...
    def __getitem__(self, index: SupportsIndex | slice) -> "Item | Lazy[Item]":
        if isinstance(index, slice):
            return Lazy(self.make, self.numbers[index], self.origin, self.home)
        return self.make(int(self.numbers[index]))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Lazy | list | tuple):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(list(self))

    @property
    def identity(self) -> str:
        """What tells these items in this order from all others; empty where their origin is unknown."""
        if not self.origin:
            return ""
        return hashlib.sha256(self.origin.encode() + self.numbers.tobytes()).hexdigest()


def take(items: Sequence[Item], indices: Sequence[int] | NDArray[np.int64]) -> Sequence[Item]:
    """Returns some of the items, in the order given: lazily if they are lazy."""
    if isinstance(items, Lazy):
        return Lazy(items.make, items.numbers[as_numbers(indices)], items.origin, items.home)
    return [items[index] for index in indices]


def as_numbers(indices: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns indices as an array."""
    if isinstance(indices, range):
        return np.arange(indices.start, indices.stop, indices.step, dtype=np.int64)
    if isinstance(indices, Lazy):
        return indices.numbers
    return np.asarray(indices, dtype=np.int64)
