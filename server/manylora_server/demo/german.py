"""The same facts told in German, with adjectives and articles that agree."""

from __future__ import annotations

from random import Random

from manylora_server.demo.facts import Character, Facts
from manylora_server.demo.lexicon import Adjective, Noun

LEAD = "... auf Deutsch: "

ENDINGS = {
    "nominative": {"m": ("", "er"), "f": ("e", "e"), "n": ("", "es")},
    "accusative": {"m": ("en", "en"), "f": ("e", "e"), "n": ("", "es")},
}
THE = {
    "nominative": {"m": "der", "f": "die", "n": "das"},
    "accusative": {"m": "den", "f": "die", "n": "das"},
}

OPENINGS = (
    "Es war einmal {an}, {who} hieß {n}.",
    "Es war einmal {an} namens {n}.",
    "Vor langer Zeit lebte {home} {an} namens {n}.",
    "{n} war {an} und wohnte {home}.",
)

PLOTS = (
    (
        ("{He} hatte {ao_acc} und war sehr glücklich.", "{n} liebte {his_o_acc} über alles."),
        ("Doch eines Tages war {the_o} weg.", "Eines Morgens war {the_o} verschwunden."),
        ("{n} suchte {p} und {q}, aber fand nichts.", "{n} suchte {p} und weinte."),
        (
            '"Ich helfe dir", sagte {fn}, {fan}.',
            'Da kam {fn}, {fan}, und fragte: "Warum weinst du?"',
        ),
        ("Zusammen fanden sie {the_o_acc} {q}.", "{q_cap} fand {fn} {the_o_acc}."),
        ("{n} freute sich sehr und tanzte mit {fn}.", "Seit diesem Tag sind sie Freunde."),
    ),
    (
        ("Eines Nachts kam ein großer Sturm.", "Eines Tages blies der Wind sehr stark."),
        ("Das Dach flog weg, und es war kalt.", "Ein Baum fiel auf das kleine Haus."),
        ('"Wo soll ich jetzt schlafen?", rief {n}.', "{n} saß im Regen und war traurig."),
        (
            '"Komm zu mir", sagte {fn}, {fan}.',
            'Da kam {fan} namens {fn} und sagte: "Ich helfe dir."',
        ),
        ("Zusammen bauten sie ein neues Haus.", "Sie arbeiteten drei Tage lang."),
        (
            "Nun hat {n} ein schönes Haus und einen guten Freund.",
            "Und wenn sie nicht gestorben sind, dann leben sie noch heute.",
        ),
    ),
    (
        ("Aber {n} hatte Angst im Dunkeln.", "Nur vor der Nacht hatte {n} Angst."),
        ("Eines Nachts war ein Geräusch {p}.", 'Da rief jemand {p}: "Hallo!"'),
        ("Es war nur {fn}, {fan}.", "Das war {fn}, {fan} mit einer Lampe."),
        (
            '"Schau, wie hell die Sterne sind", sagte {fn}.',
            '"Der Mond passt auf uns auf", sagte {fn}.',
        ),
        ("Sie zählten die Sterne und lachten.", "{n} sah den Mond an und lächelte."),
        ("Seitdem hat {n} keine Angst mehr.", "Dann schlief {n} glücklich ein."),
    ),
    (
        ("Eines Tages fand {n} {p} {ao_acc}.", "Eines Morgens lag {ao} {p}."),
        ('"Das gehört mir!", rief {fn}, {fan}.', "{fan_cap} namens {fn} wollte {the_o_acc} haben."),
        ("Sie stritten den ganzen Tag.", "Sie schrien so laut, dass die Vögel wegflogen."),
        ("Am Abend war {n} traurig und allein.", "Am Abend saß {n} {q} und dachte nach."),
        ('"Wir können teilen", sagte {n}.', '"Es tut mir leid", sagte {n} zu {fn}.'),
        ("Da lachten beide und spielten zusammen.", "Und so wurden sie die besten Freunde."),
    ),
    (
        ("{n} hatte keine Freunde und war oft allein.", "{n} wünschte sich einen Freund."),
        ("Eines Nachts fiel ein Stern vom Himmel.", "Da sah {n} {p} einen hellen Stern."),
        ('"Ich wünsche mir einen Freund", sagte {n}.', "{n} schloss die Augen und wartete."),
        ("Am Morgen klopfte es an der Tür.", "Am nächsten Tag sang jemand {q}."),
        (
            'Es war {fn}, {fan}. "Wollen wir spielen?"',
            'Da stand {fan} und sagte: "Ich heiße {fn}."',
        ),
        ("Sie spielten bis zum Abend.", "Nun war {n} nie wieder allein."),
    ),
)


def noun_phrase(word: str, case: str, adjective: Adjective, noun: Noun) -> str:
    """`word` (ein, sein or ihr) with adjective and noun, all three agreeing in `case`."""
    word_ending, adjective_ending = ENDINGS[case][noun.gender]
    return f"{word}{word_ending} {adjective.german}{adjective_ending} {noun.german}"


def described(who: Character) -> str:
    """For instance "ein kleiner Fuchs"."""
    return noun_phrase("ein", "nominative", who.trait, who.animal)


def german_slots(facts: Facts) -> dict[str, str]:
    """What the German templates may name; names as in `facts.english_slots`."""
    hero, item, colour = facts.hero, facts.item, facts.colour
    he, his = ("sie", "ihr") if hero.female else ("er", "sein")
    return {
        "n": hero.name,
        "an": described(hero),
        "who": THE["nominative"][hero.animal.gender],
        "He": he.capitalize(),
        "fn": facts.friend.name,
        "fan": described(facts.friend),
        "fan_cap": "E" + described(facts.friend)[1:],
        "ao": noun_phrase("ein", "nominative", colour, item),
        "ao_acc": noun_phrase("ein", "accusative", colour, item),
        "his_o_acc": noun_phrase(his, "accusative", colour, item),
        "the_o": f"{THE['nominative'][item.gender]} {item.german}",
        "the_o_acc": f"{THE['accusative'][item.gender]} {item.german}",
        "home": facts.home.german_at,
        "p": facts.first_place.german_at,
        "q": facts.second_place.german_at,
        "q_cap": facts.second_place.german_at[0].upper() + facts.second_place.german_at[1:],
    }


def german(rng: Random, facts: Facts) -> str:
    """A whole tale in German."""
    slots = german_slots(facts)
    steps = (OPENINGS, *rng.choice(PLOTS))
    return " ".join(rng.choice(step).format_map(slots) for step in steps)
