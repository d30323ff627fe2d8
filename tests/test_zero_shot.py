"""Zero-shot evaluation checks the order of the names."""

import numpy as np
import pytest

from studies.zero_shot import check_names

NAMES = ["cat", "dog", "boat", "car"]


def labels_and(predicted_of, right=0.8, n=100, seed=0):
    """n images a class, of which a share `right` is called predicted_of[class], the rest anything."""
    generator = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), n)
    predicted = np.where(
        generator.random(4 * n) < right, np.asarray(predicted_of)[labels], generator.integers(4, size=4 * n)
    )
    return labels, predicted


def test_right_names_say_nothing():
    check = check_names(*labels_and([0, 1, 2, 3]), NAMES)
    assert check.words() == ""
    assert check.mean_recall == pytest.approx(0.85, abs=0.05)
    assert check.matched_recall == pytest.approx(check.mean_recall)
    assert not check.swapped


def test_names_in_another_order_are_found():
    check = check_names(*labels_and([1, 2, 3, 0]), NAMES)
    assert check.suspicious
    assert "'cat' as 'dog'" in check.words()
    assert "caption_names" in check.words()


def test_two_swapped_names_among_four_are_named():
    check = check_names(*labels_and([0, 1, 3, 2]), NAMES)
    assert check.swapped == (("boat", "car"), ("car", "boat"))


def test_guessing_is_called_chance():
    check = check_names(*labels_and([0, 1, 2, 3], right=0.0), NAMES)
    assert check.at_chance
    assert not check.suspicious
    assert "no better than chance" in check.words()


def test_everything_called_one_name_is_chance():
    labels = np.repeat(np.arange(4), 50)
    check = check_names(labels, np.zeros_like(labels), NAMES)
    assert check.mean_recall == 0.25
    assert check.at_chance


def test_classes_without_images_do_not_count():
    labels = np.repeat([0, 1], 50)
    check = check_names(labels, labels, NAMES)
    assert check.mean_recall == 1.0
    assert not check.words()
