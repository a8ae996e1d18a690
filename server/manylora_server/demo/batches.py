"""Batches of token ids from streams of samples."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from manylora_server.demo import lexicon
from manylora_server.demo.corpus import PLAIN, STYLES, Sample, samples

IGNORED = -100
"""The label that transformers leaves out of the loss."""

POOL = 16
"""Batches drawn together and sorted by length, so that little of a batch is padding."""

CALLBACK_WEIGHT = 6.0
"""What a name or thing counts in the loss where the tale has mentioned it before.

Without this a model of this size learns sentences long before it learns who the tale is about, and
then writes fluent tales in which every sentence has another hero.
"""

Batch = tuple[Tensor, Tensor, Tensor]


def mixture(seed: int, plain_share: float) -> Iterator[Sample]:
    """The base's text: plain tales, and every style behind a first line that names it.

    A model that has met the styles under their names is what adapters of real models start from;
    without the name the base tells plain tales only.
    """
    rng = Random(f"mixture/{seed}")
    streams = {style: samples(style, seed) for style in (PLAIN, *STYLES)}
    while True:
        if rng.random() < plain_share:
            yield next(streams[PLAIN])
        else:
            sample = next(streams[rng.choice(STYLES)])
            tagged = f"{sample.style}:\n{sample.prefix}"
            yield Sample(sample.style, tagged, sample.continuation)


def batches(
    source: Iterator[Sample], tokenizer: PreTrainedTokenizerFast, size: int, seed: int
) -> Iterator[Batch]:
    """Right-padded (ids, labels, weights) of shape [size, longest]; one tale a row, bos to eos."""
    rng = Random(f"batches/{seed}")
    pad = tokenizer.convert_tokens_to_ids(tokenizer.pad_token)
    facts = _fact_tokens(tokenizer)
    while True:
        rows = sorted(_encode(list(islice(source, size * POOL)), tokenizer), key=_row_length)
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        rng.shuffle(groups)
        for group in groups:
            yield _pad(group, pad, facts)


def _row_length(row: tuple[list[int], int]) -> int:
    return len(row[0])


def _fact_tokens(tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The ids that names and things are written with, in every style."""
    words = [*lexicon.BOYS, *lexicon.GIRLS]
    for noun in (*lexicon.ANIMALS, *lexicon.OBJECTS, *lexicon.FOODS):
        words += [noun.english, noun.german, noun.emoji]
    spelled = [f" {form}" for word in words for form in (word, word.upper())]
    encoded = tokenizer.backend_tokenizer.encode_batch(spelled, add_special_tokens=False)
    return frozenset(token for word in encoded for token in word.ids)


def _encode(drawn: list[Sample], tokenizer: PreTrainedTokenizerFast) -> list[tuple[list[int], int]]:
    """Rows of ids with the number of leading ids that are given rather than learned."""
    backend = tokenizer.backend_tokenizer
    end = tokenizer.convert_tokens_to_ids(tokenizer.eos_token)
    prefixes = backend.encode_batch([sample.prefix for sample in drawn])
    rest = backend.encode_batch([sample.continuation for sample in drawn], add_special_tokens=False)
    return [
        (before.ids + after.ids + [end], len(before.ids))
        for before, after in zip(prefixes, rest, strict=True)
    ]


def _pad(rows: list[tuple[list[int], int]], pad: int, facts: frozenset[int]) -> Batch:
    longest = max(len(ids) for ids, _ in rows)
    inputs = torch.full((len(rows), longest), pad)
    labels = torch.full((len(rows), longest), IGNORED)
    weights = torch.ones(len(rows), longest)
    for i, (ids, given) in enumerate(rows):
        inputs[i, : len(ids)] = torch.tensor(ids)
        labels[i, given : len(ids)] = torch.tensor(ids[given:])
        mentioned: set[int] = set()
        for j, token in enumerate(ids):
            if token in mentioned:
                weights[i, j] = CALLBACK_WEIGHT
            elif token in facts:
                mentioned.add(token)
    return inputs, labels, weights
