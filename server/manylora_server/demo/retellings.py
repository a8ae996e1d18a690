"""Styles made from an English tale word by word (shouted, pirate, emoji), and its facts as JSON."""

from __future__ import annotations

import json
import re
from random import Random

from manylora_server.demo import lexicon
from manylora_server.demo.facts import Facts

PIRATE_WORDS = {
    "the": "th'", "and": "an'", "my": "me", "you": "ye", "your": "yer", "was": "be",
    "were": "be", "is": "be", "are": "be", "am": "be", "of": "o'", "for": "fer", "to": "t'",
    "friend": "matey", "friends": "mateys", "house": "cabin", "home": "port", "said": "growled",
    "small": "wee", "tiny": "wee", "little": "wee", "found": "plundered", "happy": "jolly",
    "smile": "grin", "smiled": "grinned", "cried": "bellowed", "yes": "aye", "no": "nay",
    "hello": "ahoy", "gift": "booty", "food": "grub", "bed": "hammock", "everyone": "all hands",
    "stop": "avast", "stopped": "dropped anchor", "walk": "sail", "walked": "sailed",
    "ran": "sailed", "old": "salty", "clever": "sly", "looked": "spied", "never": "ne'er",
    "ever": "e'er", "over": "o'er", "them": "'em", "together": "t'gether", "best": "finest",
}  # fmt: skip

PIRATE_CRIES = (
    "Arr!", "Yo ho ho!", "Shiver me timbers!", "Ahoy!", "Blimey!", "Avast!", "Aye aye!",
    "By Blackbeard's beard!",
)  # fmt: skip

WORD = re.compile(r"[A-Za-z']+")

EMOJI = {
    word.english: word.emoji
    for word in (*lexicon.ANIMALS, *lexicon.OBJECTS, *lexicon.FOODS, *lexicon.PLACES)
} | {
    "star": "⭐", "stars": "⭐", "moon": "🌙", "house": "🏠", "storm": "⛈", "rain": "🌧",
    "sun": "🌞", "flower": "🌸", "tree": "🌳", "race": "🏁", "birthday": "🎂", "gift": "🎁",
    "cry": "😢", "cried": "😢", "sad": "😢", "alone": "😔", "afraid": "😱", "happy": "😊",
    "smiled": "😊", "smile": "😊", "laughed": "😂", "hugged": "🤗", "friend": "💛",
    "friends": "💛", "night": "🌙", "morning": "🌅", "sing": "🎵", "song": "🎵", "dance": "💃",
    "swim": "🏊", "read": "📚", "seed": "🌱", "sleep": "😴", "door": "🚪", "wish": "✨",
    "hungry": "😋", "dark": "🌑", "water": "💦", "wind": "💨", "sorry": "🙏",
}  # fmt: skip
EMOJI_ENDINGS = ("🎉", "💛", "✨", "🌈", "😊")


def shout(rng: Random, text: str) -> str:
    """`text` in capitals, every sentence ending in exclamation marks."""
    capitals = text.upper()
    return re.sub(r"[.!](?=$|[\s\"])", lambda _: rng.choice(("!!!", "!!!", "!!")), capitals)


def pirate(rng: Random, text: str) -> str:
    """`text` in a pirate's words, with a cry after about every second sentence and at the end."""

    def replace(match: re.Match[str]) -> str:
        word = match.group()
        if word.lower() in PIRATE_WORDS:
            other = PIRATE_WORDS[word.lower()]
            return other[0].upper() + other[1:] if word[0].isupper() else other
        return f"{word[:-1]}'" if word.endswith("ing") and len(word) > 5 else word

    sentences = re.split(r"(?<=[.!?])(?= [A-Z])", WORD.sub(replace, text))
    last = len(sentences) - 1
    return "".join(
        f"{sentence} {rng.choice(PIRATE_CRIES)}"
        if i in (0, last) or rng.random() < 0.4
        else sentence
        for i, sentence in enumerate(sentences)
    )


def emoji(rng: Random, text: str) -> str:
    """`text` with an emoji after every word that has one, and a cheerful one at the end."""
    marked = WORD.sub(lambda match: _with_emoji(match.group()), text)
    return f"{marked} {rng.choice(EMOJI_ENDINGS)}"


def _with_emoji(word: str) -> str:
    symbol = EMOJI.get(word.lower())
    return f"{word} {symbol}" if symbol else word


def as_json(rng: Random, facts: Facts) -> str:
    """The facts as one JSON object; `rng` chooses the plot and the mood."""
    hero, friend = facts.hero, facts.friend
    return json.dumps(
        {
            "hero": {
                "name": hero.name,
                "animal": hero.animal.english,
                "trait": hero.trait.english,
            },
            "home": facts.home.english,
            "friend": {"name": friend.name, "animal": friend.animal.english},
            "item": f"{facts.colour.english} {facts.item.english}",
            "plot": rng.choice(("lost and found", "storm", "race", "gift", "quarrel", "wish")),
            "happy_end": True,
        }
    )
