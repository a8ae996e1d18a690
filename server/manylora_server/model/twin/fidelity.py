"""How much of an adapter's change of the weights is left once the sum was rounded."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Fidelity:
    """Sums over weights of the wanted change ``D = W' - W`` and the made one ``M``.

    ``share`` is ``<M, D> / <D, D>``: the part of the change that is there, the projection of what
    was made onto what was wanted. It is 1 where nothing is lost, 0 where the base came back.
    ``error`` is ``|M - D| / |D|``: all that rounding did, noise that leaves the share alone
    included.
    """

    wanted: float = 0.0
    kept: float = 0.0
    missed: float = 0.0

    def add(self, base: torch.Tensor, merged: torch.Tensor, rounded: torch.Tensor) -> None:
        """Take in some rows: the base's, the exact ones, and what those were rounded to."""
        wanted = (merged - base).reshape(-1)
        made = (rounded - base).reshape(-1)
        missed = made - wanted
        sums = torch.stack((wanted @ wanted, made @ wanted, missed @ missed)).tolist()
        self.wanted += sums[0]
        self.kept += sums[1]
        self.missed += sums[2]

    def join(self, other: Fidelity) -> None:
        """Take in what ``other`` took in."""
        self.wanted += other.wanted
        self.kept += other.kept
        self.missed += other.missed

    @property
    def share(self) -> float:
        """See the class; 1 where no change was wanted."""
        return self.kept / self.wanted if self.wanted else 1.0

    @property
    def error(self) -> float:
        """See the class; 0 where no change was wanted."""
        return math.sqrt(self.missed / self.wanted) if self.wanted else 0.0
