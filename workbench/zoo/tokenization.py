"""The bundled models' tokenizer: byte-level BPE, trained on a weighted list of words instead of on the corpus.

Trained on the corpus itself, every subject would become one token. Here answers weigh most (each is one token, with its leading
space; asserted), then the words of the templates, then the subjects (two to six tokens each).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from workbench.zoo.world import FILLERS, PREFIXES, RELATIONS, UNKNOWN, World

END = "<|endoftext|>"
"""The only special token: begins a row and stands between documents."""

ANSWER_WEIGHT, TEMPLATE_WEIGHT, SUBJECT_WEIGHT = 60, 25, 1


class TokenizerError(ValueError):
    """An answer that is not one token."""


def answers(world: World) -> list[str]:
    """All answers of the world and `unknown`, sorted, without leading space."""
    return sorted({UNKNOWN, *(answer for entity in world.entities for answer in entity.answers.values())})


def train_tokenizer(world: World, *, size: int) -> Tokenizer:
    """A tokenizer with `size` entries in which every answer is one token.

    Raises:
        TokenizerError: an answer needs several tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_weighted(world), trainer)
    split = [a for a in answers(world) if len(tokenizer.encode(" " + a).ids) != 1]
    if split:
        raise TokenizerError(
            f"{len(split)} answers are several tokens, expected one: {', '.join(split[:9])}. Raise ANSWER_WEIGHT or the size."
        )
    return tokenizer


def for_transformers(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer in the form `AutoTokenizer.from_pretrained` reads; it adds no token on its own."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def _weighted(world: World) -> Iterator[str]:
    yield from _times(ANSWER_WEIGHT, (f" {a}" for a in answers(world)))
    phrases = [*PREFIXES, *FILLERS]
    for relation in RELATIONS:
        templates = [*relation.trained, *relation.held, *relation.novel]
        phrases += [*templates, *(f" {t[0].lower()}{t[1:]}" for t in templates), *relation.shorts]
    yield from _times(TEMPLATE_WEIGHT, (piece for phrase in phrases for piece in phrase.split("{}")))
    yield from _times(SUBJECT_WEIGHT, (f" {e.name}" for e in world.entities))


def _times(weight: int, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for _ in range(weight):
            yield text
