"""How adapters can be combined, and with which settings. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from manylora_store.errors import CombinationError

Method = Literal["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
METHODS: tuple[Method, ...] = get_args(Method)
PRUNING: frozenset[Method] = frozenset({"ties", "dare_linear", "dare_ties", "magnitude_prune"})
SAME_RANK: frozenset[Method] = PRUNING | {"linear"}

DEFAULT_DENSITY = 0.5
MAX_RANK = 65_536


@dataclass(frozen=True, slots=True)
class Recipe:
    """A method with its settings (``combining`` has the equations).

    ``density`` is the share of values that pruning methods keep, ``rank`` what ``svd`` cuts to
    (``None``: the largest rank of the members), ``seed`` that of the random methods.

    Raises:
        CombinationError: a method that does not exist, or a setting out of its range.
    """

    method: Method = "cat"
    density: float | None = None
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise CombinationError(
                f"method: {self.method!r} came; it is one of {', '.join(METHODS)}", "method"
            )
        density = self.density
        if density is not None and not (math.isfinite(density) and 0 < density <= 1):
            raise CombinationError(
                f"density: {density} came; it is the share of values to keep, over 0 and up to 1",
                "density",
            )
        if self.rank is not None and not 1 <= self.rank <= MAX_RANK:
            raise CombinationError(f"rank: {self.rank} came; it is from 1 to {MAX_RANK}", "rank")

    @property
    def kept(self) -> float:
        """The share of values that a pruning method keeps."""
        return DEFAULT_DENSITY if self.density is None else self.density

    def unused(self) -> list[str]:
        """Return a warning for each setting that the method does not look at."""
        warnings = []
        if self.density is not None and self.method not in PRUNING:
            warnings.append(f"density has no meaning for method {self.method} and was not used")
        if self.rank is not None and self.method != "svd":
            warnings.append(f"rank has no meaning for method {self.method} and was not used")
        return warnings


def check_weight(name: str, weight: float) -> float:
    """Return ``weight``; ``CombinationError`` if it is not finite."""
    if not math.isfinite(weight):
        raise CombinationError(
            f"adapters: the weight of {name!r} is {weight}; a finite number is expected",
            "adapters",
        )
    return weight
