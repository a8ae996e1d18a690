"""The same facts as a breaking-news bulletin."""

from __future__ import annotations

from random import Random

from manylora_server.demo.facts import Facts, english_slots

LEAD = " ... "

HEADLINES = (
    "BREAKING NEWS from the {H}: ",
    "BREAKING NEWS, {hour} o'clock: ",
    "BREAKING NEWS tonight: ",
    "BREAKING NEWS: ",
)

STORIES = (
    (
        ("{n}, {an} who lives {home}, has lost {ao}.", "{An} named {n} has lost {ao} {home}."),
        (
            '"It was here yesterday," {n} told our reporter.',
            '"I looked everywhere," {n} told our reporter.',
        ),
        (
            "Police are searching {p} and {q}.",
            "A search {p} has found nothing so far.",
        ),
        (
            "One witness, {fan} named {fn}, says the {o0} was last seen {q}.",
            "{fn}, {fan}, has offered some {food} to anyone who finds it.",
        ),
    ),
    (
        (
            "A {w} storm has hit the {H}, and {n} the {a} has lost {his} roof.",
            "{An} named {n} has no home after a storm {home}.",
        ),
        (
            '"I only saved my {o}," {n} told our reporter.',
            '"The wind was very loud," {n} told our reporter.',
        ),
        (
            "{fn}, {fan}, has taken {him} in for the night.",
            "Volunteers led by {fn} the {fa} are already building a new house.",
        ),
        (
            "Roads {p} are closed until further notice.",
            "Experts say that friends are the best help in a storm.",
        ),
    ),
    (
        (
            "{n}, {an} from the {H}, has won the big race to the {P}.",
            "{An} named {n} has saved {fn} the {fa} {p}.",
        ),
        (
            '"I just did what anyone would do," {n} told our reporter.',
            '"I am only {an}," {n} told our reporter.',
        ),
        (
            "{fn}, {fan} who saw it all, called {him} a hero.",
            "The mayor will give {him} {ao} tomorrow.",
        ),
        (
            "A party with {food} for everyone will be held {q}.",
            "Crowds are waiting {q} to see the hero.",
        ),
    ),
    (
        (
            "A star has fallen {p}, and {n} the {a} saw it first.",
            "{An} named {n} has found {ao} {p}.",
        ),
        (
            '"I could not believe my eyes," {n} told our reporter.',
            '"I made a wish at once," {n} told our reporter.',
        ),
        (
            "Experts, among them {fan} named {fn}, are on their way.",
            "{fn} the {fa} says that it belongs to {fhim}, and talks go on.",
        ),
        (
            "Visitors are asked to keep away from the {P}.",
            "Schools {q} will stay closed for a day.",
        ),
    ),
)

WEATHER = (
    "Weather: {w}. Back to the studio.",
    "More at {hour}. Now the weather: {w}.",
    "This is {anchor} for Forest News.",
    "Stay with us for updates. This is {anchor}, {home}.",
)

ANCHORS = ("Barbara Hoot", "Walter Wing", "Gloria Pond", "Fred Feather")


def news(rng: Random, facts: Facts) -> str:
    """A whole bulletin: headline, story with a quotation, sign-off."""
    slots = english_slots(facts)
    slots |= {
        "An": facts.hero.description.capitalize(),
        "hour": str(rng.randint(1, 12)),
        "anchor": rng.choice(ANCHORS),
    }
    steps = (*rng.choice(STORIES), WEATHER)
    report = " ".join(rng.choice(step).format_map(slots) for step in steps)
    return rng.choice(HEADLINES).format_map(slots) + report
