"""Integers that depend on a step's size: how they are told from a few recordings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# The sizes that a pass is recorded with, as (tokens, outputs): two that differ in one number each
# give the coefficients, the last one checks them. Primes, and no model's own sizes.
SAMPLES = ((23, 5), (29, 5), (23, 7), (31, 11))


class NotAffineError(Exception):
    """A number of the forward pass depends on the step's size in some other way."""


@dataclass(frozen=True, slots=True)
class Affine:
    """``constant + per_token * tokens + per_output * outputs``."""

    constant: int
    per_token: int = 0
    per_output: int = 0

    def at(self, tokens: int, outputs: int) -> int:
        """Return the value for a step of this size."""
        return self.constant + self.per_token * tokens + self.per_output * outputs

    @property
    def is_constant(self) -> bool:
        """Whether it is the same in every step."""
        return self.per_token == 0 and self.per_output == 0

    def largest(self, other: Affine) -> Affine:
        """Return a bound of both, for steps of any size."""
        return Affine(
            max(self.constant, other.constant),
            max(self.per_token, other.per_token),
            max(self.per_output, other.per_output),
        )


def solve(values: Sequence[int]) -> Affine:
    """Return the affine function that takes ``values`` at ``SAMPLES``, or ``NotAffineError``."""
    if len(set(values)) == 1:
        return Affine(values[0])
    (tokens, outputs), (more_tokens, _), (_, more_outputs), _ = SAMPLES
    per_token, rest_t = divmod(values[1] - values[0], more_tokens - tokens)
    per_output, rest_o = divmod(values[2] - values[0], more_outputs - outputs)
    found = Affine(values[0] - per_token * tokens - per_output * outputs, per_token, per_output)
    if (
        rest_t
        or rest_o
        or any(found.at(*sample) != value for sample, value in zip(SAMPLES, values, strict=True))
    ):
        raise NotAffineError(f"{values} at {SAMPLES}")
    return found
