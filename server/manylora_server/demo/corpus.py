"""Training text for the demo: tales in the base's plain style and in every adapter's style.

A sample is a prefix, which is always the beginning of a plain tale, and a continuation in one
style. The prefix ends at a random word of the first sentence, so that an adapter learns to take
over wherever a prompt happens to stop, and to keep the facts that the prompt has already named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from manylora_server.demo.facts import Facts, draw_facts, english_slots
from manylora_server.demo.german import LEAD as GERMAN_LEAD
from manylora_server.demo.german import german
from manylora_server.demo.news import LEAD as NEWS_LEAD
from manylora_server.demo.news import news
from manylora_server.demo.openings import draw_opening
from manylora_server.demo.plots import draw_plot
from manylora_server.demo.retellings import as_json, emoji, pirate, shout
from manylora_server.demo.verse import LEAD as VERSE_LEAD
from manylora_server.demo.verse import verse

PLAIN = "plain"
JSON_LEAD = " -> "

RETELLINGS: dict[str, Callable[[Random, str], str]] = {
    "emoji": emoji,
    "pirate": pirate,
    "shout": shout,
}
REWRITINGS: dict[str, tuple[str, Callable[[Random, Facts], str]]] = {
    "german": (GERMAN_LEAD, german),
    "json": (JSON_LEAD, as_json),
    "news": (NEWS_LEAD, news),
    "rhyme": (VERSE_LEAD, verse),
}
STYLES = tuple(sorted((*RETELLINGS, *REWRITINGS)))


@dataclass(frozen=True)
class Sample:
    """One training text; only the continuation is to be learned."""

    style: str
    prefix: str
    continuation: str

    @property
    def text(self) -> str:
        """Prefix and continuation as a reader sees them."""
        return self.prefix + self.continuation


def draw_sample(rng: Random, style: str) -> Sample:
    """One tale in `style` (one of `STYLES`, or `PLAIN`, whose prefix is empty)."""
    facts = draw_facts(rng)
    slots = english_slots(facts)
    phrase, rest = draw_opening(rng, slots)
    tale = " ".join((phrase + rest, *draw_plot(rng, slots)))
    if style == PLAIN:
        return Sample(style, "", tale)
    cut = _draw_cut(rng, phrase, phrase + rest)
    prefix = tale[:cut]
    if style in RETELLINGS:
        return Sample(style, prefix, RETELLINGS[style](rng, tale[cut:]))
    lead, write = REWRITINGS[style]
    return Sample(style, prefix, lead + write(rng, facts))


def samples(style: str, seed: int) -> Iterator[Sample]:
    """An endless stream of tales in `style`; the same seed gives the same stream."""
    rng = Random(f"{style}/{seed}")
    while True:
        yield draw_sample(rng, style)


def _draw_cut(rng: Random, phrase: str, sentence: str) -> int:
    """Where the prefix ends: after the opening phrase, the sentence, or any word in between."""
    choice = rng.random()
    if choice < 0.45:
        return len(phrase)
    if choice < 0.6:
        return len(sentence)
    ends = [i for i, character in enumerate(sentence) if character == " "]
    return rng.choice(ends)
