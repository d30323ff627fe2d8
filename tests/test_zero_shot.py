"""Zero-shot evaluation checks the order of the names, and says why where it cannot evaluate."""

import numpy as np
import pytest
import torch

from datamodules.synthetic import Synthetic
from lightning_modules.clip import CLIP
from lightning_modules.errors import ModelError
from lightning_modules.text.transformer import SmallText
from studies.zero_shot import check_names, evaluate_zero_shot

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
    assert check.chance == pytest.approx(0.25)
    assert not check.swapped


def test_names_in_another_order_are_found():
    check = check_names(*labels_and([1, 2, 3, 0]), NAMES)
    assert check.suspicious
    assert "'cat' as 'dog'" in check.words()
    assert "caption_names" in check.words()


def test_two_swapped_names_among_four_are_named():
    check = check_names(*labels_and([0, 1, 3, 2]), NAMES)
    assert check.swapped == (("boat", "car"), ("car", "boat"))
    assert check.suspicious
    assert "2 classes fit other names" in check.words()


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


def test_few_images_a_class_do_not_accuse_the_names():
    """The naming that fits an image or two a class best fits them far better than the true one, whatever the names."""
    generator = np.random.default_rng(0)
    names = [f"n{number}" for number in range(50)]
    accused = 0
    for images in (1, 2, 4):
        labels = np.repeat(np.arange(50), images)
        for _ in range(10):
            check = check_names(labels, generator.integers(50, size=len(labels)), names)
            accused += check.suspicious
            assert check.at_chance
    assert accused == 0


def test_eight_images_in_another_order_are_enough():
    labels = np.repeat(np.arange(4), 2)
    assert check_names(labels, (labels + 1) % 4, NAMES).suspicious


def test_one_image_proves_nothing():
    check = check_names(np.array([0]), np.array([0]), NAMES)
    assert check.at_chance
    assert "the images are few" in check.words()


def test_always_the_name_of_the_only_class_there_is_chance():
    check = check_names(np.zeros(50, dtype=np.int64), np.zeros(50, dtype=np.int64), NAMES)
    assert check.at_chance


def test_unknown_classes_are_passed_over():
    labels = np.array([-1] * 50 + [0] * 50 + [3] * 50)
    check = check_names(labels, np.abs(labels), NAMES)
    assert check.mean_recall == 1.0
    assert check.words() == ""


def tower(backbone):
    torch.manual_seed(0)
    return CLIP(backbone=backbone, text=SmallText(vocabulary=64, context=8, width=16, layers=1, heads=2), embedding=8)


def test_labels_get_only_numbers_that_need_no_threshold():
    data = Synthetic(task="multilabel", classes=3, num_train=20, num_test=20, captions=["{}"])
    result = evaluate_zero_shot(tower("test_resnet"), data, "test", torch.device("cpu"))
    assert {value.name for value in result.metrics} == {
        *("auroc", "average_precision", "mean_auroc", "mean_average_precision")
    }


def test_a_size_that_the_net_cannot_take():
    data = Synthetic(classes=3, num_train=20, num_test=6, image_size=40, captions=["{}"])  # patches of 16 pixels
    with pytest.raises(ModelError, match="cannot take images of 40 pixels") as error:
        evaluate_zero_shot(tower("test_vit"), data, "test", torch.device("cpu"))
    assert "image_size" in str(error.value)
