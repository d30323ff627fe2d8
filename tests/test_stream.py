"""The stream: what sample i of epoch e looks like depends on (seed, e, i) alone."""

import hashlib

import numpy as np
import pytest

from datamodules import ImageFolder, Synthetic
from datamodules.errors import DataError
from datamodules.samplers import (
    EvaluationSampler,
    StreamSampler,
    balance_weights,
    divide_batch,
    epoch_order,
    mix,
)
from tests.data import tables


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return tables.create_tree(tmp_path_factory.mktemp("tree"), images=12)


def digests(root, *, workers, epochs=2, **arguments):
    """A hash of every batch of the first epochs: images, labels and indices."""
    data = ImageFolder(
        root=str(root),
        image_size=16,
        batch_size=8,
        num_workers=workers,
        seed=7,
        transform="inception_crop",
        **arguments,
    )
    loader = data.train_dataloader()
    return [
        [
            hashlib.sha256(b"".join(batch[key].numpy().tobytes() for key in ("image", "label", "index"))).hexdigest()
            for batch in loader
        ]
        for _ in range(epochs)
    ]


@pytest.mark.parametrize("workers", [1, 4])
def test_same_samples_and_augmentations_for_any_number_of_workers(tree, workers):
    alone = digests(tree, workers=0)
    assert digests(tree, workers=workers) == alone
    assert not set(alone[0]) & set(alone[1])  # no two epochs alike


def test_the_stream_is_pinned(tree):
    """A change of the order or of the hash would make every published run irreproducible."""
    sampler = StreamSampler(np.arange(100), 8, seed=7)
    assert [row for row, _, _ in sampler.batch(0)] == PINNED_ROWS
    assert mix(7, 0, np.arange(3)).tolist() == PINNED_SEEDS


PINNED_ROWS = [63, 0, 79, 98, 92, 44, 4, 12]
PINNED_SEEDS = [5620672417314516668, 923064801687522736, 2699158312959822386]


def test_same_augmentation_never_repeats_within_a_class_of_images(tree):
    """One image, many places in the stream: every place augments it otherwise."""
    data = ImageFolder(root=str(tree), image_size=16, batch_size=8, seed=7, shots=1)
    seen = {}
    loader = data.train_dataloader()
    for _ in range(6):
        for batch in loader:
            for index, image in zip(batch["index"].tolist(), batch["image"], strict=True):
                seen.setdefault(index, []).append(image.numpy().tobytes())
    assert min(len(views) for views in seen.values()) > 10
    assert all(len(set(views)) > 0.9 * len(views) for views in seen.values())


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 4)])
def test_ranks_and_accumulation_share_the_global_batch(world, accumulate):
    rows = np.arange(50)
    whole = StreamSampler(rows, 16, seed=1)
    parts = [StreamSampler(rows, 16, seed=1, rank=rank, world=world, accumulate=accumulate) for rank in range(world)]
    for step in range(7):
        shares = [part.batch(step * accumulate + a) for part in parts for a in range(accumulate)]
        assert all(len(share) == 16 // world // accumulate for share in shares)
        assert sorted(key for share in shares for key in share) == sorted(whole.batch(step))
        for rank, part in enumerate(parts):
            mine = [key for a in range(accumulate) for key in part.batch(step * accumulate + a)]
            assert mine == whole.batch(step)[rank::world]


def test_resume_needs_only_the_number_of_batches_done():
    rows = np.arange(37)
    whole = StreamSampler(rows, 8, seed=1)
    undisturbed = [batch for _ in range(3) for batch in whole]
    for done in range(len(undisturbed)):
        resumed = StreamSampler(rows, 8, seed=1, position=lambda done=done: done)
        rest = list(resumed)
        assert rest == undisturbed[done : done + len(rest)]
        assert (done + len(rest)) % len(whole) == 0


def test_step_based_training_chains_epochs_into_one_pass():
    rows = np.arange(37)
    epochs = [batch for sampler in [StreamSampler(rows, 8, seed=1)] for _ in range(3) for batch in sampler]
    chained = list(StreamSampler(rows, 8, seed=1, total_steps=10))
    assert chained == epochs[:10]


def test_set_smaller_than_a_batch_is_filled_by_further_permutations():
    order = epoch_order(5, 12, seed=0, epoch=0)
    assert sorted(order[:5]) == sorted(order[5:10]) == list(range(5))
    (batch,) = list(StreamSampler(np.arange(5), 12, seed=0))
    assert len(batch) == 12
    assert len({seed for _, seed, _ in batch}) == 12  # a repeated image is augmented anew


def test_every_image_once_an_epoch():
    for epoch in range(3):
        assert sorted(epoch_order(100, 100, seed=0, epoch=epoch)) == list(range(100))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("n", [1, 2, 5, 54])
def test_evaluation_reads_every_row_once_over_all_ranks(world, n):
    rows = np.arange(10, 10 + n)
    keys = [
        key for rank in range(world) for batch in EvaluationSampler(rows, 4, rank=rank, world=world) for key in batch
    ]
    assert sorted(index for _, _, index in keys if index >= 0) == rows.tolist()
    for rank in range(world):  # Lightning crashes on a rank without a batch
        assert len(EvaluationSampler(rows, 4, rank=rank, world=world)) >= 1


def test_balance_gives_every_class_the_same_share():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    weights = balance_weights(labels)
    np.testing.assert_allclose([weights[labels == c].sum() for c in range(3)], 1 / 3)
    order = epoch_order(100, 30_000, seed=0, epoch=0, weights=weights)
    np.testing.assert_allclose(np.bincount(labels[order]) / 30_000, 1 / 3, atol=0.02)


def test_balance_of_labels_raises_the_rare_ones():
    labels = np.zeros((100, 2), np.float32)
    labels[:50, 0], labels[:2, 1] = 1, 1
    labels[60:70] = np.nan
    weights = balance_weights(labels)
    np.testing.assert_allclose(weights[0] / weights[10], 25)
    np.testing.assert_allclose(weights.sum(), 1)


@pytest.mark.parametrize(
    ("batch", "world", "most", "expected"),
    [(128, 4, None, (32, 1)), (128, 4, 8, (8, 4)), (12, 1, 5, (4, 3)), (7, 1, 4, (1, 7))],
)
def test_global_batch_divides(batch, world, most, expected):
    assert divide_batch(batch, world, most) == expected


def test_global_batch_that_does_not_divide_is_an_error():
    with pytest.raises(DataError, match="batch_size 10 does not divide over 4 devices"):
        divide_batch(10, 4)


def test_shots_num_images_and_fraction_exclude_each_other():
    with pytest.raises(DataError, match="shots and fraction exclude each other"):
        Synthetic(shots=1, fraction=0.5)


def test_num_images_and_fraction_are_nested_at_natural_prevalence():
    def rows(**arguments):
        return Synthetic(num_train=400, num_test=10, classes=4, val_fraction=0.0, **arguments).rows("train")

    small, large = rows(num_images=40), rows(fraction=0.5)
    assert len(small) == 40
    assert len(large) == 200
    assert set(small) < set(large)
    labels = Synthetic(num_train=400, num_test=10, classes=4).read_table().labels
    assert np.bincount(labels[small]).tolist() == [10] * 4


def test_few_shot_seeds_differ():
    sets = [
        tuple(Synthetic(num_train=400, num_test=10, shots=2, few_shot_seed=seed).rows("train")) for seed in range(4)
    ]
    assert len(set(sets)) == 4
