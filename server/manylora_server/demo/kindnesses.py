"""Plots in which somebody does something kind or brave; see `plots` for how they are told."""

from __future__ import annotations

GIFT = (
    ("{His} best friend was {fn}, {fan}.", "Every day {he} played with {fn} the {fa}."),
    (
        "Soon it was {fn}'s birthday, but {n} had no gift.",
        'One {w} {t} {fn} said, "Tomorrow is my birthday!"',
    ),
    (
        "{n} went to the {P} to look for something nice.",
        "{n} thought about it all night long.",
        "{n} looked {p} and {q} for a gift.",
    ),
    (
        "There {he} found {ao}.",
        "At last {he} made {ao} with {his} own hands.",
        "{He} had only {ao}, and {he} loved it very much.",
    ),
    (
        '"This is for you," {n} said, and gave {fn} the {o0}.',
        "{He} gave the {o0} to {fn} with a big smile.",
    ),
    (
        '"It is the best gift of all," said {fn}, and they ate {food} together.',
        "{fn} laughed and hugged {n}. It was the best birthday ever.",
        '{fn} smiled. "The best gift is a friend like you," {fhe} said.',
    ),
)

SHARE = (
    (
        "One {w} {t} {he} made some {food}.",
        "{He} had some {food} and nothing else to eat.",
        "One {t} {he} found some {food} {p}.",
    ),
    (
        "It smelled so good that {fn} the {fa} came to the door.",
        "On the way home {he} met {fn}, {fan}.",
        "Just then {fan} named {fn} came along the road.",
    ),
    (
        '"I am so hungry," said {fn}.',
        '"I have not eaten for two days," {fn} said.',
        "{fn} looked very thin and very tired.",
    ),
    (
        "{n} wanted to eat it all, but {he} gave half to {fn}.",
        '"There is enough for two," said {n}.',
        '"Sit down and eat with me," said {n} with a smile.',
    ),
    (
        "They ate together {q} until the sun went down.",
        "They ate the {food} and told each other stories.",
    ),
    (
        "The next day {fn} came back with {ao} to say thank you.",
        "{n} learned that {food} tastes better with a friend.",
        "From that day on, {n} never ate alone.",
    ),
)

RACE = (
    (
        "One {t} {n} and {fn} the {fa} ran a race to the {P}.",
        '"I am faster than you," said {fn} the {fa} one {w} {t}.',
    ),
    (
        "The winner would get {ao}.",
        "The prize was {ao}, and everyone wanted to win it.",
    ),
    (
        "{n} ran as fast as {he} could, and {fn} ran too.",
        "{n} and {fn} ran side by side.",
        "{fn} was fast, but {n} was faster.",
    ),
    (
        "Near the {Q}, {fn} fell and hurt {fhis} foot.",
        "Then {fn} fell into a deep hole {q}.",
        "Halfway there, {fn} got stuck in the mud {q}.",
    ),
    (
        "{n} stopped at once and went back to help {fhim}.",
        "{n} could have won, but {he} turned around and helped {fhim}.",
    ),
    (
        "They came in last, but everyone clapped for {n}.",
        'They finished together. "You are the real winner," said {fn}.',
        "Nobody won the {o0} that day, but {n} won a friend.",
    ),
)

SEED = (
    ("One {w} {t} {he} found a seed {p}.", "One {t} the wind left a tiny seed at {his} door."),
    (
        '"That is only a seed," said {fn} the {fa}.',
        '{fn}, {fan}, laughed and said, "Nothing will grow from that."',
    ),
    (
        "{n} put it in the earth and gave it water every day.",
        "But {n} planted it {home} and waited.",
    ),
    (
        "Days went by, and nothing happened.",
        "It rained, and it snowed, and {n} waited.",
        "{He} even sang to it every {t}.",
    ),
    (
        "Then, one morning, there was a tall flower with golden leaves.",
        "At last a green leaf came out of the ground.",
        "In spring there was a tree full of sweet fruit.",
    ),
    (
        '"I was wrong," said {fn}, and {n} gave {fhim} a new seed.',
        "{n} was proud, and {fn} said sorry.",
        'All the animals came to see it. "Good things take time," said {n}.',
    ),
)

TREASURE = (
    (
        "One {t} {he} found an old map {p}.",
        "One {w} {t} the wind brought an old map to {his} door.",
    ),
    (
        '"It shows a treasure {q}!" said {fn} the {fa}.',
        "{He} showed it to {fn}, {fan}, and they set out at once.",
    ),
    (
        "They walked through the tall grass and sang as they went.",
        "They walked all day, and {n} was never tired.",
        "The way was long, so {n} carried {fn}'s bag.",
    ),
    (
        "At last they dug a hole {q} and found a box.",
        "Under a big stone {q} there was a wooden box.",
    ),
    (
        "There was no gold in it, only {ao}.",
        "Inside the box was {ao}.",
    ),
    (
        '"The best treasure was the walk with you," said {n}.',
        "They took turns with the {o0} and kept the map for ever.",
        "They laughed all the way home, and {n} made some {food}.",
    ),
)

MUSIC = (
    (
        "{He} knew a song that made everyone smile.",
        "Every {t} {he} sang a song for the other animals.",
    ),
    (
        "One {w} {t} {he} met {fn}, {fan}, who was very sad.",
        "Only {fn} the {fa} never smiled.",
    ),
    (
        '"Why do you never laugh?" asked {n}.',
        '"What is the matter?" {n} asked softly.',
    ),
    (
        '"I have lost my {o}," said {fn}.',
        '"Nobody ever comes to visit me," said {fn}.',
        '"I miss my old home {p}," said {fn}.',
    ),
    (
        "So {n} sat down {q} and sang {his} song.",
        "So {n} sat down beside {fhim} and sang.",
    ),
    (
        "{fn} began to hum, and at last {fhe} smiled.",
        "Soon {fn} was dancing, and the birds sang too.",
        '"Thank you," said {fn}. "Now I have a song and a friend."',
    ),
)
