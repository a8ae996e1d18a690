"""Who, where and what of one tale, drawn once and then told in any style."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from manylora_server.demo import lexicon
from manylora_server.demo.lexicon import Adjective, Noun, Place


@dataclass(frozen=True)
class Character:
    """Somebody in a tale; pronouns follow the name."""

    name: str
    female: bool
    animal: Noun
    trait: Adjective

    @property
    def description(self) -> str:
        """For instance "a shy fox"."""
        return with_article(f"{self.trait.english} {self.animal.english}")


@dataclass(frozen=True)
class Facts:
    """Everything that a tale may mention; the same thing is always the same word."""

    hero: Character
    friend: Character
    home: Place
    first_place: Place
    second_place: Place
    colour: Adjective
    item: Noun
    food: Noun
    hobby: str
    weather: str
    time: str


def with_article(phrase: str) -> str:
    """`phrase` with the indefinite article that its first sound asks for."""
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def draw_facts(rng: Random) -> Facts:
    """Draw facts in which no two characters and no two places are alike."""
    hero_animal, friend_animal = rng.sample(lexicon.ANIMALS, 2)
    hero_trait, friend_trait = rng.sample(lexicon.TRAITS, 2)
    hero_name, friend_name = rng.choice(lexicon.HEROES), rng.choice(lexicon.FRIENDS)
    home, first_place, second_place = rng.sample(lexicon.PLACES, 3)
    return Facts(
        hero=Character(hero_name, hero_name in lexicon.GIRLS, hero_animal, hero_trait),
        friend=Character(friend_name, friend_name in lexicon.GIRLS, friend_animal, friend_trait),
        home=home,
        first_place=first_place,
        second_place=second_place,
        colour=rng.choice(lexicon.COLOURS),
        item=rng.choice(lexicon.OBJECTS),
        food=rng.choice(lexicon.FOODS),
        hobby=rng.choice(lexicon.HOBBIES),
        weather=rng.choice(lexicon.WEATHERS),
        time=rng.choice(lexicon.TIMES),
    )


def english_slots(facts: Facts) -> dict[str, str]:
    """What the English templates may name.

    Hero: n, a (animal), an (described), he/him/his and He/His. Friend: the same after an f, and
    Fan. Things: o ("red bell"), o0 ("bell"), ao ("a red bell"), food. Places: home, p and q as
    phrases, H, P and Q as bare nouns. Circumstance: w (weather), t (time of day), hobby.
    """
    thing = f"{facts.colour.english} {facts.item.english}"
    slots = {
        "o": thing,
        "o0": facts.item.english,
        "ao": with_article(thing),
        "food": facts.food.english,
        "home": facts.home.at,
        "p": facts.first_place.at,
        "q": facts.second_place.at,
        "H": facts.home.english,
        "P": facts.first_place.english,
        "Q": facts.second_place.english,
        "w": facts.weather,
        "t": facts.time,
        "hobby": facts.hobby,
    }
    for prefix, who in (("", facts.hero), ("f", facts.friend)):
        he, him, his = ("she", "her", "her") if who.female else ("he", "him", "his")
        slots |= {
            f"{prefix}n": who.name,
            f"{prefix}a": who.animal.english,
            f"{prefix}an": who.description,
            f"{prefix}he": he,
            f"{prefix}him": him,
            f"{prefix}his": his,
            f"{prefix.upper()}He": he.capitalize(),
            f"{prefix.upper()}His": his.capitalize(),
        }
    slots["Fan"] = facts.friend.description.capitalize()
    return slots
