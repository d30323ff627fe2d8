"""Captions as tokens: what is refused, how scripts are split, numbers that never change, what is cut."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_modules.errors import ModelError
from lightning_modules.text.tower import read_captions, token_counts
from lightning_modules.text.words import END, START, hash_captions, split_words, word_number

NUMBERS = [10016, 15038, 7121, 10885, 11879, 3030, 6061]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Frontal X-ray, 2 views.", ["frontal", "x", "-", "ray", ",", "2", "views", "."]),
        ("in 2019: 3.5 cm", ["in", "2", "0", "1", "9", ":", "3", ".", "5", "cm"]),
        ("DSC_12 covid19", ["dsc", "_", "1", "2", "covid", "1", "9"]),
        ("Straße, ÉCOLE", ["straße", ",", "école"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("猫とdog", ["猫", "と", "dog"]),
        ("แมว ดำ", ["แ", "ม", "ว", "ด", "ำ"]),
        ("한국 고양이", ["한국", "고양이"]),
        ("I ❤\ufe0f 🐱", ["i", "❤", "🐱"]),
        ("soft\u00adware a\u200db", ["software", "ab"]),
        ("a\n b\tc", ["a", "b", "c"]),
    ],
)
def test_words_of_many_scripts(text, words):
    assert split_words(text) == words


def test_equal_looks_give_equal_text():
    composed, decomposed, wide = "caf\u00e9", "cafe\u0301", "\uff43\uff41\uff46\u00e9"
    assert read_captions([composed, decomposed, wide, "  of\ufb01ce\u00a0A\n"]) == ["café"] * 3 + ["office A"]


def test_control_characters_are_blanks():
    assert read_captions(["it\x92s here", "bell\x07", "a\tb\nc", "\x1cat"]) == ["it s here", "bell", "a b c", "at"]


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("", ["caption 1", "empty", "drop the rows"]),
        (" \t\n\u00a0\u3000", ["caption 1", "empty"]),
        ("\u200b\ufeff", ["caption 1", "empty"]),
        (None, ["caption 1", "NoneType"]),
        (float("nan"), ["caption 1", "float: nan"]),
        (b"bytes", ["caption 1", "bytes"]),
        ("\x07\x85\n", ["caption 1", "empty"]),
        ("U\x00T\x00F\x00", ["caption 1", "U+0000", r"\x00", "UTF-8"]),
        ("half \udce9 pair", ["caption 1", "U+DCE9", "UTF-8"]),
    ],
)
def test_bad_captions_are_named(caption, words):
    with pytest.raises(ModelError) as error:
        read_captions(["a cat", caption])
    assert all(word in str(error.value) for word in words)
    str(error.value).encode()  # can be printed


def test_long_values_are_cut_in_messages():
    with pytest.raises(ModelError) as error:
        read_captions(["x" * 100 + "\x00"])
    assert "x" * 60 in str(error.value)
    assert "x" * 61 not in str(error.value)


def test_one_string_is_no_list_of_captions():
    with pytest.raises(ModelError, match="a list of strings"):
        read_captions("a cat")


def test_numbers_never_change():
    """Saved weights depend on these; they were computed once and hold in any process and on any machine."""
    words = ["a", "photo", "of", "cat", "猫", "é", "."]
    numbers = [word_number(word, 16384) for word in words]
    assert numbers == NUMBERS
    code = f"from lightning_modules.text.words import word_number; print([word_number(w, 16384) for w in {words}])"
    for seed in "01":
        done = subprocess.run(
            [sys.executable, "-X", "utf8", "-c", code],
            env={"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == str(numbers)


@pytest.mark.parametrize("words", [1000, 5000, 10000])
def test_shared_numbers_are_as_frequent_as_chance_says(words):
    numbers = np.array([word_number(f"word{place}", 16384) for place in range(words)])
    assert numbers.min() >= 3
    assert numbers.max() < 16384
    _, place, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    expected = 1 - (1 - 1 / 16381) ** (words - 1)
    assert (counts[place] > 1).mean() == pytest.approx(expected, abs=0.02)
    assert expected == pytest.approx({1000: 0.06, 5000: 0.26, 10000: 0.46}[words], abs=0.005)


def test_rows_against_a_plain_loop():
    captions = ["a cat", "A CAT", "cat, a", "one two three four five six", "x"]
    tokens, cut = hash_captions(captions, vocabulary=500, context=6)
    for caption, row in zip(captions, tokens.tolist(), strict=True):
        body = [word_number(word, 500) for word in split_words(caption)][:4]
        assert row == [START, *body, END] + [0] * (4 - len(body))
    assert cut == 1
    assert tokens[0].tolist() == tokens[1].tolist() != tokens[2].tolist()
    assert token_counts(torch.from_numpy(tokens)).tolist() == [4, 4, 5, 6, 3]


@pytest.mark.parametrize(("words", "cut"), [(3, 0), (4, 0), (5, 1), (9, 1)])
def test_only_longer_captions_are_cut(words, cut):
    tokens, found = hash_captions([" ".join("abcdefghi"[:words])], vocabulary=500, context=6)
    assert found == cut
    assert tokens.shape == (1, 6)
    assert tokens[0, min(words, 4) + 1] == END


def test_no_captions():
    tokens, cut = hash_captions([], vocabulary=500, context=6)
    assert tokens.shape == (0, 6)
    assert cut == 0


def test_zeros_inside_a_row_are_tokens():
    """CLIP's tokenizer numbers the exclamation mark 0."""
    assert token_counts(torch.tensor([[7, 0, 0, 9, 0, 0], [7, 9, 0, 0, 0, 0]])).tolist() == [4, 2]
