"""Words of any script as token numbers by hashing: nothing is learned, shipped or downloaded.

The hashing trick: Weinberger et al. 2009, "Feature Hashing for Large Scale Multitask Learning", arXiv 0902.2206.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import chain

import numpy as np
from numpy.typing import NDArray

START, END = 1, 2
#: Numbers that no word gets: padding 0, start 1, end 2.
RESERVED = 3
# Part of the hash: with other bytes every word would change its number, and saved weights would be worthless.
_SALT = b"farshot.words.1"
# Blocks of Unicode whose scripts put no spaces between words: Thai and Lao, Burmese, Khmer, Tai Le and New Tai Lue,
# Tai Tham, ideographic marks, kana, phonetic kana, ideographs.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


def split_words(text: str) -> list[str]:
    """Split a text, in lower case, into words, digits, marks of punctuation and symbols.

    - A word is a run of letters with their combining marks.
    - Digits stand alone: whole numbers are without end, and each would be a rare word that says nothing about its
      neighbours; ten digits are learned from every number, and positions tell 12 from 21.
    - Characters of scripts without spaces between words (Chinese, Japanese, Thai, ...) stand alone.
    - Characters without width (joiners, direction marks, variation selectors) are left out.
    """
    tokens: list[str] = []
    within_word = False
    for character in text.lower():
        kind = unicodedata.category(character)
        if kind == "Cf":
            continue
        alone = kind[0] not in "LM" or _SPACELESS.match(character) is not None
        if within_word and not alone:
            tokens[-1] += character
        elif character.isspace() or (kind[0] == "M" and not alone):
            within_word = False
        else:
            tokens.append(character)
            within_word = not alone
    return tokens


def word_number(word: str, vocabulary: int) -> int:
    """Return the number of a token, in [3, vocabulary): the same on every machine and in every process.

    Two words may share a number, and then also their embedding. Of n equally likely words, each shares its number
    with another at odds of 1 − (1 − 1 / (vocabulary − 3))^(n − 1): with 16,384 numbers that is 6 % of 1,000 words,
    26 % of 5,000, 46 % of 10,000. Frequent words are few, so most shared numbers are a frequent word's and a rare
    one's, and the transformer tells them apart by their neighbours.
    """
    return RESERVED + _word_hash(word) % (vocabulary - RESERVED)


def _word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode(), digest_size=8, person=_SALT).digest(), "little")


@lru_cache(maxsize=1 << 16)
def _chunk_hashes(chunk: str) -> tuple[int, ...]:
    return tuple(map(_word_hash, split_words(chunk)))


def hash_captions(captions: Sequence[str], vocabulary: int, context: int) -> tuple[NDArray[np.int64], int]:
    """Return the tokens of captions, int64 (B, context), zero-padded, and how many captions were cut to fit.

    A row is start, the words' numbers, end. What stands between two spaces is memorised with its hashes, because
    few words make up most of a text.

    Args:
        captions: Texts in Unicode's form NFKC.
        vocabulary: Numbers that tokens can have, the three reserved ones included; 4 or more.
        context: Longest number of tokens, start and end included; 3 or more.
    """
    rows = [list(chain.from_iterable(map(_chunk_hashes, caption.lower().split()))) for caption in captions]
    room = context - 2
    lengths = np.fromiter((min(len(row), room) for row in rows), np.int64, len(rows))
    hashes = np.fromiter(chain.from_iterable(row[:room] for row in rows), np.uint64, int(lengths.sum()))
    tokens = np.zeros((len(rows), context), np.int64)
    tokens[:, 0] = START
    tokens[:, 1:-1][np.arange(room) < lengths[:, None]] = RESERVED + hashes % (vocabulary - RESERVED)
    tokens[np.arange(len(rows)), lengths + 1] = END
    return tokens, sum(len(row) > room for row in rows)
