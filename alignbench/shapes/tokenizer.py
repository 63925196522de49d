"""A byte-pair tokenizer of about 160 tokens in which every word of the captions is one token.

It is a real `CLIPTokenizer`; the merges are not learnt from counts but made word by word. A merge made later ranks
lower, so it can never divert a word that is already complete: words are single tokens by construction, in any order.
"""

import re
import string
from collections.abc import Iterable
from itertools import pairwise

from transformers import CLIPTokenizer

from alignbench.shapes.captions import CONTROL_WORDS, records

MAX_LENGTH = 16
"""Text tokens of the generator: the longest caption has 10 words, a control word and its full stop, begin and end."""

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
_END_OF_WORD = "</w>"
_CHARACTERS = string.ascii_lowercase + ".,"


def caption_words() -> tuple[str, ...]:
    """Every word of the world's captions and control words, in alphabetical order."""
    texts = [record["prompt"] for record in records()]
    texts += [word for words in CONTROL_WORDS.values() for word in words]
    return tuple(sorted({word for text in texts for word in re.findall(r"[a-z]+", text)}))


def build_tokenizer(words: Iterable[str] | None = None) -> CLIPTokenizer:
    """Makes the tokenizer in which each of ``words`` (by default `caption_words`) is one token.

    Ids: 0 begin, 1 end (also padding and unknown), then the characters, then the merges.
    """
    vocabulary = [BEGIN, END, *_CHARACTERS, *(character + _END_OF_WORD for character in _CHARACTERS)]
    merges: dict[tuple[str, str], int] = {}
    for word in caption_words() if words is None else words:
        symbols = apply_merges(word, merges)
        while len(symbols) > 1:
            pair = symbols[0], symbols[1]
            merges[pair] = len(merges)
            vocabulary.append("".join(pair))
            symbols = apply_merges(word, merges)
    return CLIPTokenizer(
        vocab={token: k for k, token in enumerate(vocabulary)},
        merges=list(merges),
        bos_token=BEGIN,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=MAX_LENGTH,
    )


def apply_merges(word: str, merges: dict[tuple[str, str], int]) -> list[str]:
    """The symbols of a word after all merges that apply, best rank first (byte-pair encoding, Sennrich et al. 2016)."""
    symbols = [*word[:-1], word[-1] + _END_OF_WORD]
    while ranked := [(merges[pair], k) for k, pair in enumerate(pairwise(symbols)) if pair in merges]:
        _, k = min(ranked)
        symbols[k : k + 2] = ["".join(symbols[k : k + 2])]
    return symbols
