"""The same facts as verse: couplets whose rhyme is fixed and whose inner words are free."""

from __future__ import annotations

from random import Random

from manylora_server.demo.facts import Facts, english_slots

LEAD = " ...\n"

Couplets = tuple[str, ...]

OPENINGS: Couplets = (
    "{An} named {n}, so they say,\nlived {home}, not far away.",
    "{An} named {n}, so I am told,\nlived {home} in days of old.",
    "{n} was {an}, it is true,\nwho lived {home} when the world was new.",
    "There lived {an}, and {n} was {his} name,\nand {home} no two days were ever the same.",
    "{home_cap}, in the morning light,\nlived {n} the {a}, so quick and so bright.",
)

LOST: tuple[Couplets, ...] = (
    (
        "{He} had {ao}, and {he} loved it so well,\nit was dearer than {n} could ever tell.",
        "{He} had {ao}, the best in the land,\nand all day long it was close at hand.",
    ),
    (
        "But one {w} {t} it was nowhere around,\nand {n} sat down and cried on the ground.",
        "But the wind came along with a whistle and blow,\n"
        "and where was the {o0}? {n} did not know.",
    ),
    (
        '{fn} the {fa} came by on the way,\nand said, "I will help you to find it today."',
        '"Do not be sad," said {fn} with a smile,\n"we two will look for it mile after mile."',
    ),
    (
        "They looked {p}, they looked high and low,\n"
        "they looked in the sun and they looked in the snow.",
        "They looked {p} and {q} until night,\nand there was the {o0} in the pale moonlight.",
    ),
    (
        "So if you lose something, do not despair:\na friend will help you find it somewhere.",
        "And {n} and {fn}, from that day on,\nwere friends until all of the stars were gone.",
    ),
)

NIGHT: tuple[Couplets, ...] = (
    (
        "But {n} was afraid of the dark of the night,\nand never would sleep without any light.",
        "When evening came and the sun went to bed,\n"
        "then {n} would hide with the sheets on {his} head.",
    ),
    (
        "One {w} night there came a loud knock,\nas late as eleven upon the clock.",
        "One night by the {P}, as soft as can be,\nthere came a small sound, and {n} went to see.",
    ),
    (
        "It was only {fn}, {fan} with a light,\nwho came to wish {n} a very good night.",
        'It was {fn} the {fa}, who said, "Look up high,\nthere are ten thousand lamps in the sky."',
    ),
    (
        "They counted the stars, they counted them all,\n"
        "the big and the bright, the faint and the small.",
        "They sat {q} and they looked at the moon,\nand {fn} was humming a sweet little tune.",
    ),
    (
        "Now {n} loves the night, and {n} loves the dark,\n"
        "and listens {home} to the song of the lark.",
        "And now when it's dark {n} closes {his} eyes,\n"
        "and dreams of the stars in the wide open skies.",
    ),
)

FRIEND: tuple[Couplets, ...] = (
    (
        "But {n} had no friend, not even one,\nto sit with or walk with or play in the sun.",
        "But {n} was alone, and that is no fun,\nwhen there is nobody to share the sun.",
    ),
    (
        "One {w} {t}, with some {food} in a sack,\n{he} went to the {P} and never looked back.",
        "So {he} packed some {food} and a song and a map,\n"
        "and {he} put on {his} coat and {he} put on {his} cap.",
    ),
    (
        "And there {q}, all alone on a stone,\nsat {fn} the {fa}, who was skin and bone.",
        "And whom did {he} meet as {he} went along?\n{fn} the {fa}, who was singing a song.",
    ),
    (
        '"Come eat," said {n}, "there is plenty for two,\nand half of whatever I have is for you."',
        '"Hello," said {n}, "will you walk with me?\n'
        'There is so much out there in the world to see."',
    ),
    (
        "They ate and they laughed till the end of the day,\n"
        "and nobody since has seen {n} go astray.",
        "So they walked and they talked till the sun went down,\n"
        "the two best friends of the whole little town.",
    ),
)

PLOTS = (LOST, NIGHT, FRIEND)


def verse(rng: Random, facts: Facts) -> str:
    """A whole tale as six couplets, one verse a line."""
    slots = english_slots(facts)
    slots["An"] = facts.hero.description.capitalize()
    slots["home_cap"] = facts.home.at.capitalize()
    steps = (OPENINGS, *rng.choice(PLOTS))
    return "\n".join(rng.choice(step).format_map(slots) for step in steps)
