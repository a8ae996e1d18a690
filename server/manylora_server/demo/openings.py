"""The first sentence of a tale: the words that open it and the words that name its hero."""

from __future__ import annotations

from random import Random

OPENING_PHRASES = (
    "Once upon a time", "Once upon a time", "Once upon a time", "Once upon a time",
    "Long ago", "Long, long ago", "Many years ago", "Once", "A long time ago",
    "In the old days", "In a land far away", "Far, far away", "Many winters ago",
)  # fmt: skip

PHRASED_OPENINGS = (
    " there was {an} named {n} who lived {home}.",
    " there was {an} named {n} who lived {home}.",
    " there lived {an} named {n} who loved to {hobby}.",
    " there was {an} called {n}, and {his} home was {home}.",
    ", {home}, there lived {an} named {n}.",
    " {an} named {n} lived in a little house {home}.",
)

WHOLE_OPENINGS = (
    ("There once was", " {an} named {n} who lived {home}."),
    ("There was once", " {an} called {n} who loved to {hobby}."),
    ("This is the tale of", " {n}, {an} who lived {home}."),
    ("In a little house", " {home} lived {an} named {n}."),
    ("One {w} {t}", " {an} named {n} sat {home}."),
    ("It was a {w} {t}", ", and {an} named {n} was alone {home}."),
    ("{n}", " was {an} who lived {home}."),
    ("The", " {a} {n} lived {home} and loved to {hobby}."),
)


def draw_opening(rng: Random, slots: dict[str, str]) -> tuple[str, str]:
    """A first sentence in two parts: the words that open a tale, and the rest."""
    if rng.random() < 0.65:
        opening, rest = rng.choice(OPENING_PHRASES), rng.choice(PHRASED_OPENINGS)
    else:
        opening, rest = rng.choice(WHOLE_OPENINGS)
    return opening.format_map(slots), rest.format_map(slots)
