"""What happens in the English tales, as templates over `facts.english_slots`.

A plot is a sequence of steps and a step a choice of sentences. Any choice follows from any choice
before it, so that a tale is always coherent while the number of tales stays very large.
"""

from __future__ import annotations

from random import Random

from manylora_server.demo import kindnesses, troubles

Plot = tuple[tuple[str, ...], ...]

PLOTS: tuple[Plot, ...] = (
    kindnesses.GIFT,
    kindnesses.MUSIC,
    kindnesses.RACE,
    kindnesses.SEED,
    kindnesses.SHARE,
    kindnesses.TREASURE,
    troubles.DARK,
    troubles.LOST,
    troubles.QUARREL,
    troubles.STORM,
    troubles.STUCK,
    troubles.WISH,
)


def draw_plot(rng: Random, slots: dict[str, str]) -> list[str]:
    """The sentences after the opening, from one plot."""
    return [rng.choice(step).format_map(slots) for step in rng.choice(PLOTS)]
