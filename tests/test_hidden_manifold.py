"""What a source and a target task share: three dials, each nested, paired and exact at its ends."""

from dataclasses import replace

import numpy as np
import pytest

from datamodules import Synthetic
from datamodules.errors import DataError
from datamodules.generator import ImageGenerator
from datamodules.hidden_manifold import CODE, FLIP, STRAY

SOURCE = ImageGenerator()
TARGET = ImageGenerator(role="target")
FINDINGS = ImageGenerator(num_classes=6, task="multilabel", role="target", look="radiograph")
ALL = {"similarity": 1.0, "shared_features": 1.0, "shared_rule": 1.0}
NONE = dict.fromkeys(ALL, 0.0)
INDEX = np.arange(3000)


def same_rows(one, other):
    return np.array([np.array_equal(a, b) for a, b in zip(one, other, strict=True)])


def same_directions(one, other):
    return np.all([same_rows(a, b) for a, b in zip(one.directions, other.directions, strict=True)], axis=0)


@pytest.mark.parametrize(("share", "count"), [(0, 0), (0.25, 5), (0.5, 10), (1, 20)])
def test_similarity_is_the_share_of_directions_that_are_the_sources(share, count):
    target = replace(TARGET, similarity=share)
    same = same_directions(SOURCE, target)
    assert same.sum() == count
    np.testing.assert_array_equal(target.source_directions, same)
    np.testing.assert_array_equal(same_rows(SOURCE.homes, target.homes), same)
    named = replace(TARGET, similarity=0.9, shared_directions=share)  # the named dial wins
    np.testing.assert_array_equal(named.images(INDEX[:4]), target.images(INDEX[:4]))


def test_directions_change_neither_labels_nor_latents_and_nest():
    far, half, near = (replace(TARGET, similarity=share) for share in (0.0, 0.5, 0.75))
    np.testing.assert_array_equal(far.labels(INDEX), TARGET.labels(INDEX))
    np.testing.assert_array_equal(far.latents(INDEX), TARGET.latents(INDEX))
    assert (far.images(INDEX[:100]) != TARGET.images(INDEX[:100])).mean() > 0.3
    np.testing.assert_array_equal(same_directions(near, half), [*[True] * 10, *[False] * 5, *[True] * 5])


@pytest.mark.parametrize("target", [TARGET, FINDINGS, replace(FINDINGS, num_classes=20)])
@pytest.mark.parametrize("share", [0, 0.3, 0.5, 1])
def test_the_rule_shares_the_codes_of_the_first_classes(target, share):
    shared = replace(target, shared_rule=share)
    source = replace(target, role="source")
    count = round(share * target.num_classes)
    assert shared.source_codes.sum() == count
    np.testing.assert_array_equal(shared.codes[:count], source.codes[:count])
    assert len(np.unique(shared.codes, axis=0)) == target.num_classes
    np.testing.assert_array_equal(shared.labels(INDEX), target.labels(INDEX))
    assert same_directions(shared, target).all()


def test_classes_that_are_not_shared_keep_their_code_unless_the_source_needs_it():
    crowded = ImageGenerator(role="target", num_classes=30, num_features=8)  # 30 of 70 codes in either task: many clash
    own, source = crowded.codes, replace(crowded, role="source").codes
    displaced = 0
    for share in (0.2, 0.5, 0.9):
        codes = replace(crowded, shared_rule=share).codes
        count = round(30 * share)
        wanted = {tuple(code) for code in source[:count]}
        for row in range(count, 30):
            clashes = tuple(own[row]) in wanted
            displaced += clashes
            assert np.array_equal(codes[row], own[row]) != clashes
            assert (own == codes[row]).all(1).any()
        assert len(np.unique(codes, axis=0)) == 30
    assert displaced > 5


def test_the_first_classes_of_a_larger_source_are_those_of_a_smaller_target():
    large = ImageGenerator(num_classes=20)
    np.testing.assert_array_equal(replace(TARGET, shared_rule=1.0).codes, large.codes[:10])


@pytest.mark.parametrize("target", [TARGET, FINDINGS])
def test_statistics_of_shared_features_stay_and_the_others_get_their_own(target):
    shared = target.latents(INDEX)
    for share in (0, 0.5, 0.75):
        partly = replace(target, shared_features=share)
        np.testing.assert_array_equal(partly.labels(INDEX), target.labels(INDEX))
        latents = partly.latents(INDEX)
        same = (latents == shared).all(0)
        labelled = partly.codes.any(0) & (target.task == "multilabel")
        np.testing.assert_array_equal(same, partly.source_features | labelled)
        both = (latents > 0) & (shared > 0)
        np.testing.assert_array_equal(latents[both], shared[both])
        assert same_directions(partly, target).all()
        np.testing.assert_array_equal(partly.codes, target.codes)
    half, none = (replace(target, shared_features=share).latents(INDEX) for share in (0.5, 0))
    np.testing.assert_array_equal(half[:, 10:], none[:, 10:])


@pytest.mark.parametrize(("target", "base"), [(TARGET, FLIP), (FINDINGS, STRAY)])
def test_features_with_statistics_of_their_own_have_their_rate_and_come_in_troupes(target, base):
    index = np.arange(20_000)
    own = replace(target, shared_features=0.0)
    labels = own.labels(index)
    coded = own.codes[labels.astype(int)] if target is TARGET else labels @ own.codes > 0
    free = np.ones(20, bool) if target is TARGET else ~own.codes.any(0)
    moved = ((own.latents(index) > 0) ^ coded)[:, free]
    troupe, rate = own.occurrence[0][free], own.occurrence[1][free]
    np.testing.assert_allclose(moved.mean(0), rate, atol=0.012)
    assert rate.min() < 0.5 * base
    assert rate.max() > 1.5 * base
    for a, b in np.ndindex(len(rate), len(rate)):
        together = (moved[:, a] & moved[:, b]).mean()
        expected = min(rate[a], rate[b]) if troupe[a] == troupe[b] else rate[a] * rate[b]
        assert abs(together - expected) < 0.012
    assert 2 <= len(np.unique(troupe)) <= 5
    alone = ((target.latents(index) > 0) ^ coded)[:, free]
    assert abs(np.corrcoef(alone.T) - np.eye(free.sum())).max() < 0.05


def nearest_mean_accuracy(fit_to, target):
    """Accuracy on the target of class means in latent space that were fitted to another task."""
    latents, labels = fit_to.latents(INDEX), fit_to.labels(INDEX)
    means = np.stack([latents[labels == c].mean(0) for c in range(10)])
    distance = ((target.latents(INDEX)[:, None] - means) ** 2).sum(-1)
    return (distance.argmin(1) == target.labels(INDEX)).mean()


def test_with_everything_shared_the_target_is_the_source_task_from_other_draws():
    twin = replace(TARGET, **ALL)
    assert same_directions(twin, SOURCE).all()
    np.testing.assert_array_equal(twin.codes, SOURCE.codes)
    np.testing.assert_array_equal(twin.occurrence, SOURCE.occurrence)
    assert nearest_mean_accuracy(SOURCE, twin) > 0.93
    on, other = (world.latents(INDEX) > 0 for world in (SOURCE, twin))
    np.testing.assert_allclose(np.cov(on.T), np.cov(other.T), atol=0.025)
    images, others = (world.images(INDEX[:600]).astype(float) for world in (SOURCE, twin))
    assert (images != others).mean() > 0.9
    np.testing.assert_allclose(images.mean(0), others.mean(0), atol=11)
    np.testing.assert_allclose(images.std(), others.std(), rtol=0.03)


def test_with_nothing_shared_the_tasks_are_independent():
    stranger = replace(TARGET, **NONE)
    assert not same_directions(stranger, SOURCE).any()
    assert not same_rows(stranger.codes, SOURCE.codes).any()
    overlap = (stranger.codes.astype(int) @ SOURCE.codes.T).mean()
    assert abs(overlap - CODE * CODE / 20) < 0.25
    assert nearest_mean_accuracy(SOURCE, stranger) < 0.3


def test_the_data_module_passes_all_dials_on():
    dials = {"similarity": 0.1, "shared_features": 0.2, "shared_directions": 0.3, "shared_rule": 0.4}
    data = Synthetic(role="target", classes=5, num_train=20, num_test=5, **dials)
    assert data.generator == ImageGenerator(role="target", num_classes=5, **dials)


def test_an_impossible_number_of_classes_names_no_argument_that_the_data_module_lacks():
    with pytest.raises(DataError) as error:
        Synthetic(classes=5000)
    assert "5000 classes" in str(error.value)
    assert "2 to 2422" in str(error.value)
    assert "num_" not in str(error.value)
