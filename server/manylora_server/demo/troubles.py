"""Plots in which something goes wrong and a friend helps; see `plots` for how they are told."""

from __future__ import annotations

LOST = (
    (
        "{He} had {ao} and took it everywhere.",
        "{His} dearest thing in the world was {ao}.",
        "More than anything, {n} loved {his} {o}.",
    ),
    (
        "But one {w} {t} the {o0} was gone.",
        "One {t} {n} looked for the {o0} and could not find it.",
        "Then, one {w} {t}, {n} lost the {o0}.",
    ),
    (
        "{He} looked {p} and {q}, but it was not there.",
        "{He} searched {p} all day and began to cry.",
        "{He} asked everyone {p}, but nobody had seen it.",
    ),
    (
        'Then {fn}, {fan}, came by and said, "I will help you look."',
        '{fn} the {fa} saw {him} and asked, "Why are you so sad?"',
        'Along came {fan} named {fn}. "Do not cry," said {fn}.',
    ),
    (
        "Together they found the {o0} {q}.",
        "{fn} had a good nose and soon found the {o0} {q}.",
        "They looked until dark, and there it was, {q}!",
    ),
    (
        "{n} hugged {fn} and never lost the {o0} again.",
        "{n} was so happy that {he} danced with {fn} all {t}.",
        "{n} thanked {fn}, and they shared some {food}.",
    ),
)

STORM = (
    ("One {t} a big storm came to the {H}.", "One {w} {t} the wind blew and blew."),
    (
        "It broke the roof of {n}'s house.",
        "It took the door of {n}'s little house away.",
        "A tree fell on {his} house, and the rain came in.",
    ),
    (
        '{n} was cold and wet. "Where will I sleep?" {he} said.',
        '"Oh no!" cried {n}. "I have no home!"',
        "{n} sat in the rain with nothing but {his} {o}.",
    ),
    (
        '{fn} the {fa} opened {fhis} door and said, "Come in, you can stay with me."',
        "{fn}, {fan} from the {P}, came with wood and a hammer.",
        '"We will build it again," said {fn} the {fa}.',
    ),
    (
        "They worked together for three days.",
        "In the morning they began to build.",
        "All the animals from the {P} came to help.",
    ),
    (
        "The new house was better than the old one, and {fn} came to visit every day.",
        "When the house was ready, {n} shared {food} with everyone.",
        "Now {n} is not afraid of storms, because {he} has a friend.",
    ),
)

DARK = (
    (
        "But {n} was afraid of the dark.",
        "There was one thing {n} feared, and that was the night.",
        "When the sun went down, {n} was always afraid.",
    ),
    (
        'One {w} night {he} heard a sound {p}. "Who is there?" {he} said.',
        "One night {he} had to walk home past the {P}.",
        "One night {his} candle went out, and {he} began to cry.",
    ),
    (
        "It was only {fn}, {fan} with {ao}.",
        "Then {fn} the {fa} came to sit with {him}.",
        '"Take my hand," said {fn}, {fan} from the {Q}.',
    ),
    (
        '"Look up," said {fn}. "The stars are little lamps."',
        '"The dark is just the day with its eyes closed," said {fn}.',
        '{fn} sang a soft song and said, "The moon is watching over us."',
    ),
    (
        "{n} looked at the moon and smiled.",
        "They counted the stars until {n} fell asleep.",
        "{n} listened, and the night was quiet and kind.",
    ),
    (
        "After that {n} was never afraid of the dark again.",
        "Now {n} loves the night best of all.",
        "From then on, {n} and {fn} watched the stars together.",
    ),
)

STUCK = (
    (
        'One {w} {t} {he} heard a cry {p}. "Help! Help!"',
        "One {t} {he} was walking past the {P} when {he} heard somebody cry.",
    ),
    (
        "It was {fn}, {fan}, who was stuck in the mud.",
        "There was {fn} the {fa} at the bottom of a deep hole.",
        "{Fan} named {fn} had fallen into the water.",
    ),
    (
        '"Hold on!" said {n}. "I will get you out."',
        "{n} was not big and not strong, but {he} was not afraid.",
    ),
    (
        "{He} tied {his} scarf to a tree and pulled and pulled.",
        "{He} ran to the {Q} and came back with a long rope.",
        "{He} found a long branch and held it out to {fn}.",
    ),
    ("Little by little, {fn} came out.", "At last {fn} was safe and dry."),
    (
        '"You saved me," said {fn}. "I will never forget it."',
        "To say thank you, {fn} gave {n} {ao}.",
        "After that the two friends did everything together.",
    ),
)

QUARREL = (
    (
        "{He} and {fn} the {fa} found {ao} {p}.",
        "One {t} {n} and {fn}, {fan}, both saw {ao} {p}.",
    ),
    ('"It is mine!" said {n}.', '"I saw it first!" cried {n}.'),
    ('"No, it is mine!" said {fn}.', '"No, I saw it first!" cried {fn}.'),
    (
        "They pulled and pulled until the {o0} fell into the water.",
        "They shouted so loudly that the birds flew away.",
        "They did not speak to each other for two days.",
    ),
    (
        "{n} sat {q} and felt sad and alone.",
        "Then {n} felt sorry and went to {fn}'s house.",
    ),
    (
        '"A friend is better than a {o0}," {he} said, and {fn} smiled.',
        "In the end they took turns, and both of them were happy.",
        '"I am sorry," said {n}. "So am I," said {fn}, and they laughed.',
    ),
)

WISH = (
    ("But {n} had no friends.", "{He} was happy there, but {he} had nobody to play with."),
    (
        "One {w} night {he} saw a star fall {p}.",
        "One night {he} found {ao} {p} that could grant a wish.",
    ),
    ('"I wish for a friend," {n} said.', "{He} closed {his} eyes and wished for a friend."),
    (
        "The next morning somebody knocked at the door.",
        "All night {he} waited, and in the morning {he} heard a soft song.",
    ),
    (
        'It was {fn}, {fan}. "I am new here," said {fn}. "Can we play?"',
        '{Fan} stood there and said, "My name is {fn}. Do you like {food}?"',
    ),
    (
        "They played {q} all day long, and {n} was never lonely again.",
        "{n} smiled, for {his} wish had come true.",
        "And from that day on, {n} and {fn} were best friends.",
    ),
)
