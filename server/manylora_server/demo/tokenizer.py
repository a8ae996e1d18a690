"""The demo's tokenizer: byte-level BPE, trained on every style, in Hugging Face's usual files."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from manylora_server.demo.corpus import PLAIN, STYLES, samples

VOCABULARY = 2048
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
MAX_TOKENS = 512

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set turns = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% if turns %}{{ turns[-1]['content'] }}{% endif %}"
)
"""The last user message is the opening of a tale; tales know nothing of one another."""


def train_tokenizer(seed: int, texts_per_style: int = 4000) -> PreTrainedTokenizerFast:
    """Train on a mixture in which plain tales weigh as much as three styles."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, texts_per_style), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _texts(seed: int, texts_per_style: int) -> Iterator[str]:
    for style, count in [(PLAIN, 3 * texts_per_style)] + [(s, texts_per_style) for s in STYLES]:
        for sample in islice(samples(style, seed), count):
            yield sample.text
