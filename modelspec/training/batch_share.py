"""Which part of a batch a process computes, where several of them train one model."""

import dataclasses
from typing import Self


@dataclasses.dataclass(frozen=True)
class BatchShare:
    """A batch cut into runs of samples, one per process, and whose the share is.

    Attributes:
        sizes: samples of each process.
        rank: of this process, from 0.

    >>> share = BatchShare.of(8, processes=3, rank=1)
    >>> share.sizes, share.begin, share.stop, share.total
    ((3, 3, 2), 3, 6, 8)
    """

    sizes: tuple[int, ...]
    rank: int

    @classmethod
    def of(cls, total: int, processes: int, rank: int) -> Self:
        """Cuts `total` samples into shares as even as can be; the first ones have one more, the last may be empty."""
        least, more = divmod(total, processes)
        return cls(tuple(least + (index < more) for index in range(processes)), rank)

    @property
    def total(self) -> int:
        """Samples of the batch."""
        return sum(self.sizes)

    @property
    def size(self) -> int:
        """Samples of this process."""
        return self.sizes[self.rank]

    @property
    def begin(self) -> int:
        """The first sample of this process."""
        return sum(self.sizes[: self.rank])

    @property
    def stop(self) -> int:
        """The first sample after those of this process."""
        return self.begin + self.size
