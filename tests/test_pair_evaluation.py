"""Held-out pairs: numbers against a slow version, and the same for every batch size, order and padding."""

from functools import partial

import numpy as np
import pytest
import torch

from lightning_modules.contrastive_losses import info_nce, nt_xent
from lightning_modules.errors import ModelError, NonFiniteLossError
from lightning_modules.pair_evaluation import CollectedPairs, PairEvaluation

LOSS = partial(nt_xent, temperature=0.2, across_ranks=False)


def pairs(n, seed=0, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(n, 8, generator=generator)
    return first, first + noise * torch.randn(n, 8, generator=generator)


def evaluate(first, second, *, batch=64, order=None, sides=None, loss=LOSS):
    evaluation = PairEvaluation(loss, sides)
    index = torch.arange(len(first)) if order is None else order
    for rows in torch.split(index, batch):
        evaluation.update(first[rows], second[rows], 3 * rows)  # rows of a table are not numbered from 0 to n − 1
    return evaluation.compute()


def slow_recall(first, second, k):
    first, second = first.double(), second.double()
    near = [torch.cosine_similarity(one[None], second).argsort(descending=True)[:k].tolist() for one in first]
    return sum(i in places for i, places in enumerate(near)) / len(first)


def test_one_block_equals_the_loss_and_a_loop():
    first, second = pairs(60)
    scores = evaluate(first, second, sides=("image", "text"))
    assert scores["loss"] == pytest.approx(LOSS(first.double(), second.double()).item(), rel=1e-12)
    assert scores["samples"] == 60
    assert 0.2 < scores["matched"] < 0.9
    assert scores["matched"] == scores["recall_at_1/image_to_text"] == slow_recall(first, second, 1)
    assert scores["recall_at_5/image_to_text"] == slow_recall(first, second, 5)
    assert scores["recall_at_1/text_to_image"] == slow_recall(second, first, 1)
    assert scores["recall_at_5/text_to_image"] == slow_recall(second, first, 5)


@pytest.mark.parametrize("n", [2, 255, 256, 257, 258, 513, 600])
def test_blocks_are_fixed_and_weigh_by_their_pairs(n):
    first, second = pairs(n)
    ends = [*range(256, n - 1, 256), n]  # a block ends at 256, 512, ... where two pairs or more are left
    parts = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
    expected = sum(LOSS(first[p].double(), second[p].double()).item() * (p.stop - p.start) for p in parts) / n
    matched = sum(slow_recall(first[p], second[p], 1) * (p.stop - p.start) for p in parts) / n
    scores = evaluate(first, second)
    assert scores["loss"] == pytest.approx(expected, rel=1e-12)
    assert scores["matched"] == pytest.approx(matched)


def test_batch_size_order_and_padding_change_nothing():
    first, second = pairs(300)
    reference = evaluate(first, second, sides=("a", "b"))
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    for batch in (1, 37, 300):
        assert evaluate(first, second, batch=batch, order=shuffled, sides=("a", "b")) == reference
    evaluation = PairEvaluation(LOSS, ("a", "b"))
    evaluation.update(first[:2], second[5:7], torch.tensor([-1, -1]))
    evaluation.update(torch.cat([first, first[:1]]), torch.cat([second, second[9:10]]), torch.tensor([*range(300), -1]))
    assert evaluation.compute() == reference


def test_collapsed_embeddings_match_nothing():
    generator = torch.Generator().manual_seed(0)
    same = torch.randn(1, 19, generator=generator).expand(40, 19)
    scores = evaluate(same, same, sides=("image", "text"))
    assert scores["matched"] == 0
    assert scores["recall_at_5/text_to_image"] == 0
    assert scores["loss"] == pytest.approx(np.log(2 * 40 - 1))


def test_a_learned_scale_is_read_when_numbers_are_computed():
    scale = torch.tensor(1.0)
    evaluation = PairEvaluation(lambda a, b: info_nce(a, b, scale, across_ranks=False))
    first, second = pairs(20)
    evaluation.update(first, second, torch.arange(20))
    scale.fill_(9.0)
    expected = info_nce(first.double(), second.double(), torch.tensor(9.0))
    assert evaluation.compute()["loss"] == pytest.approx(expected.item())


@pytest.mark.parametrize("n", [0, 1])
def test_less_than_two_pairs_have_no_numbers(n):
    first, second = pairs(2)
    evaluation = PairEvaluation(LOSS, ("image", "text"))
    evaluation.update(first, second, torch.tensor([4, -1] if n else [-1, -1]))
    scores = evaluation.compute()
    assert scores.pop("samples") == n
    assert len(scores) == 6
    assert all(np.isnan(value) for value in scores.values())


def test_half_precision_and_labels_keep_their_kind():
    collected = CollectedPairs()
    collected.update(torch.ones(2, 3, dtype=torch.bfloat16), torch.tensor([7, 8]), torch.tensor([1, 0]))
    features, labels = collected.compute()
    assert features.dtype == torch.float32
    assert labels.tolist() == [8, 7]
    assert labels.dtype == torch.int64


def test_wrong_updates_are_named():
    first, second = pairs(4)
    evaluation = PairEvaluation(LOSS)
    with pytest.raises(ModelError, match="4 and 4 samples with 3"):
        evaluation.update(first, second, torch.arange(3))
    with pytest.raises(ModelError, match="without a batch"):
        PairEvaluation(LOSS).in_order()
    evaluation.update(first, second, torch.tensor([0, 5, 5, 1]))
    with pytest.raises(ModelError, match="more than once: rows 5"):
        evaluation.compute()
    broken = PairEvaluation(LOSS)
    first[2, 0] = torch.nan
    broken.update(first, second, torch.arange(4))
    with pytest.raises(NonFiniteLossError, match="1 of 4 pairs"):
        broken.compute()
