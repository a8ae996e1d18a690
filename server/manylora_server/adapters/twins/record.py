"""What is known of a twin: how it is kept, and how far it is from the adapter it stands for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from manylora_server.adapters.twins.step_times import PathChoice
from manylora_server.core.types import Precision

# A 4-bit twin that has less of the adapter's change than this is refused, unless it is forced.
LEAST_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class TwinError:
    """The twin against the path that was served until then, on the canary prompts.

    ``kl_divergence`` is of the twin's next-token distribution from that path's, in nats: the mean
    of all positions and the largest. A position's relative error is the largest difference of its
    logits over their range; the median position's and the largest are given.
    """

    positions: int
    kl_divergence: float
    largest_kl_divergence: float
    relative_logit_error: float
    largest_relative_logit_error: float
    top_token_agreement: float


@dataclass(frozen=True, slots=True)
class TwinRecord:
    """One twin. ``delta_share`` is the part of the adapter's change of the weights that survived
    rounding (``model.twin.fidelity.Fidelity.share``, over all modules); ``worst_delta_share`` that
    of the module that lost most, and ``delta_error`` what rounding did, noise included. ``bytes``
    are what it takes beside the base; ``automatic``: the policy made it, and may drop it.
    """

    precision: Precision
    storage: str
    bytes: int
    modules: int
    delta_share: float
    worst_delta_share: float
    worst_module: str | None
    delta_error: float
    error: TwinError
    forced: bool
    automatic: bool
    replayed: bool
    created_at: float
    seconds: float
    choice: PathChoice

    def as_dict(self) -> dict[str, Any]:
        """Return the record, JSON-ready."""
        plain = {
            name: getattr(self, name)
            for name in self.__dataclass_fields__
            if name not in {"error", "choice"}
        }
        return {**plain, "error": asdict(self.error), "step_times": self.choice.as_dict()}
