"""The words that tales are made of, with what each style needs to know about them.

A word carries its English form, its German form with grammatical gender, and an emoji, so that one
set of facts can be told in every style and the styles agree with one another.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Noun:
    """A countable thing or animal; `gender` is the German one: m, f or n."""

    english: str
    german: str
    gender: str
    emoji: str


@dataclass(frozen=True)
class Place:
    """A place with the phrase that puts somebody there, in English and in German."""

    english: str
    at: str
    german_at: str
    emoji: str


@dataclass(frozen=True)
class Adjective:
    """An adjective; the German form is the stem that takes an ending."""

    english: str
    german: str


ANIMALS = (
    Noun("fox", "Fuchs", "m", "🦊"),
    Noun("rabbit", "Hase", "m", "🐰"),
    Noun("mouse", "Maus", "f", "🐭"),
    Noun("bear", "Bär", "m", "🐻"),
    Noun("owl", "Eule", "f", "🦉"),
    Noun("frog", "Frosch", "m", "🐸"),
    Noun("cat", "Katze", "f", "🐱"),
    Noun("dog", "Hund", "m", "🐶"),
    Noun("duck", "Ente", "f", "🦆"),
    Noun("hedgehog", "Igel", "m", "🦔"),
    Noun("turtle", "Schildkröte", "f", "🐢"),
    Noun("goat", "Ziege", "f", "🐐"),
    Noun("pig", "Schwein", "n", "🐷"),
    Noun("hen", "Huhn", "n", "🐔"),
    Noun("pony", "Pony", "n", "🐴"),
    Noun("wolf", "Wolf", "m", "🐺"),
    Noun("otter", "Otter", "m", "🦦"),
    Noun("badger", "Dachs", "m", "🦡"),
    Noun("lamb", "Lamm", "n", "🐑"),
    Noun("swan", "Schwan", "m", "🦢"),
    Noun("beaver", "Biber", "m", "🦫"),
    Noun("snail", "Schnecke", "f", "🐌"),
    Noun("deer", "Reh", "n", "🦌"),
    Noun("lion", "Löwe", "m", "🦁"),
)

BOYS = (
    "Tom", "Ben", "Max", "Finn", "Otto", "Sam", "Leo", "Hugo", "Jack", "Felix", "Oscar", "Theo",
    "Rufus", "Emil", "Pip", "Gus", "Noah", "Paul",
)  # fmt: skip
GIRLS = (
    "Nell", "Mia", "Lily", "Rosa", "Ada", "Ivy", "Clara", "Ella", "Tilly", "Hazel", "Molly",
    "Greta", "Anna", "Poppy", "Ruby", "Lotte", "Dora", "Zoe",
)  # fmt: skip

# Heroes and friends never share a name, so that even the likeliest tale tells them apart.
HEROES = BOYS[::2] + GIRLS[::2]
FRIENDS = BOYS[1::2] + GIRLS[1::2]

TRAITS = (
    Adjective("small", "klein"),
    Adjective("brave", "mutig"),
    Adjective("clever", "klug"),
    Adjective("shy", "schüchtern"),
    Adjective("kind", "freundlich"),
    Adjective("curious", "neugierig"),
    Adjective("young", "jung"),
    Adjective("gentle", "sanft"),
    Adjective("old", "alt"),
    Adjective("cheerful", "fröhlich"),
    Adjective("lazy", "faul"),
    Adjective("lonely", "einsam"),
    Adjective("tiny", "winzig"),
    Adjective("quiet", "still"),
    Adjective("funny", "lustig"),
    Adjective("proud", "stolz"),
)

PLACES = (
    Place("river", "by the river", "am Fluss", "🌊"),
    Place("forest", "in the forest", "im Wald", "🌲"),
    Place("hill", "on the hill", "auf dem Hügel", "🌄"),
    Place("lake", "by the lake", "am See", "💧"),
    Place("meadow", "in the meadow", "auf der Wiese", "🌼"),
    Place("farm", "on the farm", "auf dem Bauernhof", "🚜"),
    Place("village", "in the village", "im Dorf", "🏡"),
    Place("mill", "near the mill", "neben der Mühle", "🌾"),
    Place("garden", "in the garden", "im Garten", "🌻"),
    Place("bridge", "under the bridge", "unter der Brücke", "🌉"),
    Place("sea", "by the sea", "am Meer", "🐚"),
    Place("oak tree", "under the oak tree", "unter der Eiche", "🌳"),
    Place("cave", "in the cave", "in der Höhle", "🪨"),
    Place("barn", "behind the barn", "hinter der Scheune", "🐄"),
    Place("castle", "near the castle", "beim Schloss", "🏰"),
)

OBJECTS = (
    Noun("ball", "Ball", "m", "⚽"),
    Noun("bell", "Glocke", "f", "🔔"),
    Noun("book", "Buch", "n", "📖"),
    Noun("key", "Schlüssel", "m", "🔑"),
    Noun("hat", "Hut", "m", "🎩"),
    Noun("kite", "Drachen", "m", "🪁"),
    Noun("lamp", "Lampe", "f", "💡"),
    Noun("drum", "Trommel", "f", "🥁"),
    Noun("boat", "Boot", "n", "⛵"),
    Noun("ring", "Ring", "m", "💍"),
    Noun("scarf", "Schal", "m", "🧣"),
    Noun("basket", "Korb", "m", "🧺"),
    Noun("cup", "Tasse", "f", "🍵"),
    Noun("coat", "Mantel", "m", "🧥"),
    Noun("button", "Knopf", "m", "🔘"),
    Noun("crown", "Krone", "f", "👑"),
    Noun("flute", "Flöte", "f", "🎶"),
    Noun("clock", "Uhr", "f", "🕰"),
)

COLOURS = (
    Adjective("red", "rot"),
    Adjective("blue", "blau"),
    Adjective("green", "grün"),
    Adjective("yellow", "gelb"),
    Adjective("golden", "golden"),
    Adjective("silver", "silbern"),
    Adjective("white", "weiß"),
    Adjective("black", "schwarz"),
    Adjective("shiny", "glänzend"),
    Adjective("brown", "braun"),
)

FOODS = (
    Noun("pie", "Kuchen", "m", "🥧"),
    Noun("cake", "Kuchen", "m", "🍰"),
    Noun("porridge", "Brei", "m", "🥣"),
    Noun("jam", "Marmelade", "f", "🍓"),
    Noun("soup", "Suppe", "f", "🍲"),
    Noun("bread", "Brot", "n", "🍞"),
    Noun("cheese", "Käse", "m", "🧀"),
    Noun("honey", "Honig", "m", "🍯"),
)

HOBBIES = (
    "sing", "dance", "swim", "read", "paint", "bake", "tell jokes", "count the stars",
    "look for shells", "sleep in the sun", "play in the rain", "watch the clouds",
    "build towers", "draw maps", "pick flowers", "roll down the hill", "write songs",
)  # fmt: skip

WEATHERS = ("rainy", "cold", "windy", "foggy", "snowy", "warm", "clear", "stormy")
TIMES = ("morning", "day", "evening", "afternoon", "night")
