"""Two ranks (gloo, CPU) have the losses, gradients and numbers of one process with all the samples."""

import multiprocessing
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing import start_processes

from lightning_modules.contrastive_losses import clamped_scale, info_nce, nt_xent
from lightning_modules.errors import ModelError
from lightning_modules.gather import gather_with_gradient, rank_offset
from lightning_modules.pair_evaluation import PairEvaluation

WORLD, PAIRS, WIDTH = 2, 10, 7
EVALUATED = 301  # does not divide over the ranks


class Encoder(nn.Module):
    """Two views through one linear map, and a learned scale."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.map = nn.Linear(WIDTH, 4, dtype=torch.float64)
        for parameter in self.map.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        self.log_scale = nn.Parameter(torch.tensor(1.1, dtype=torch.float64))

    def forward(self, first, second):
        return self.map(first), self.map(second), clamped_scale(self.log_scale)


LOSSES = {
    "nt_xent": lambda first, second, scale: nt_xent(first, second, 0.3) + 0 * scale,
    "info_nce": info_nce,
    "local": lambda first, second, scale: (
        nt_xent(first, second, 0.3, across_ranks=False) + info_nce(first, second, scale, across_ranks=False)
    ),
}


def samples(n):
    generator = torch.Generator().manual_seed(2)
    first, second = torch.randn(2, n, WIDTH, generator=generator, dtype=torch.float64)
    return first, first + second


def train_step(loss, first, second, wrap=lambda encoder: encoder):
    """Loss, and gradients as DDP averages them."""
    encoder = wrap(Encoder())
    value = loss(*encoder(first, second))
    value.backward()
    return value.item(), [parameter.grad for parameter in encoder.parameters()]


def evaluation(rows):
    first, second = samples(EVALUATED)
    pairs = PairEvaluation(partial(nt_xent, temperature=0.3, across_ranks=False), ("image", "text"))
    for batch in torch.split(rows, 50):
        pairs.update(first[batch], second[batch], batch)
    return pairs


def gathered_rows():
    """Rows of all ranks; and the gradient where every rank weighs them by its own number."""
    mine = torch.full((2, 3), float(rank_offset(1)), requires_grad=True)
    rows = gather_with_gradient(mine)
    weights = torch.arange(len(rows))[:, None] + 10.0 * rank_offset(1)
    (rows * weights).sum().backward()
    return rows.detach(), mine.grad


def rank_process(rank, folder):
    """All that two ranks do, in one process each, since a process costs seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    mine = slice(rank * PAIRS // WORLD, (rank + 1) * PAIRS // WORLD)
    first, second = samples(PAIRS)
    found = {
        name: train_step(loss, first[mine], second[mine], nn.parallel.DistributedDataParallel)
        for name, loss in LOSSES.items()
    }
    # One pair a rank is two pairs in all: each has negatives.
    found["single"] = train_step(LOSSES["nt_xent"], first[rank : rank + 1], second[rank : rank + 1])[0]
    try:
        LOSSES["local"](first[:1], second[:1], torch.tensor(1.0))
    except ModelError as error:
        found["refused"] = str(error)
    found["rows"] = gathered_rows()
    pairs = evaluation(torch.arange(rank, EVALUATED, WORLD))
    found["evaluation"] = pairs.compute()
    # A rank without samples brings padding.
    pairs = evaluation(torch.arange(EVALUATED if rank == 0 else 0))
    if rank == 1:
        pairs.update(torch.zeros(1, WIDTH), torch.zeros(1, WIDTH), torch.tensor([-1]))
    found["padded"] = pairs.compute()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    # A process that has imported everything is forked for each rank: importing costs more than all that they do.
    multiprocessing.set_forkserver_preload([__name__])
    start_processes(rank_process, args=(str(folder),), nprocs=WORLD, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", ["nt_xent", "info_nce"])
def test_losses_and_gradients_are_those_of_one_process(ranks, name):
    loss, gradients = train_step(LOSSES[name], *samples(PAIRS))
    assert sum(found[name][0] for found in ranks) / WORLD == pytest.approx(loss, abs=1e-9)
    for found in ranks:
        for ours, expected in zip(found[name][1], gradients, strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    assert gradients[1].abs().max() > 1e-3  # of the map's weights


def test_a_local_loss_sees_its_own_rank_only(ranks):
    for rank, (first, second) in enumerate(zip(*(side.chunk(WORLD) for side in samples(PAIRS)), strict=True)):
        assert ranks[rank]["local"][0] == pytest.approx(train_step(LOSSES["local"], first, second)[0], abs=1e-9)
    assert ranks[0]["local"][0] != pytest.approx(ranks[1]["local"][0])


def test_one_pair_a_rank_has_negatives_elsewhere(ranks):
    first, second = (side[:WORLD] for side in samples(PAIRS))
    expected = train_step(LOSSES["nt_xent"], first, second)[0]
    assert sum(found["single"] for found in ranks) / WORLD == pytest.approx(expected, abs=1e-9)
    assert all("1 pair has no negatives" in found["refused"] for found in ranks)


def test_gathered_rows_stand_in_rank_order_and_sum_gradients(ranks):
    for rank, found in enumerate(ranks):
        rows, gradient = found["rows"]
        assert rows[:, 0].tolist() == [0, 0, 1, 1]
        # Row i of all: i from rank 0 and i + 10 from rank 1.
        assert gradient[:, 0].tolist() == [2 * i + 10 for i in (2 * rank, 2 * rank + 1)]


def test_one_process_gathers_nothing():
    x = torch.ones(2, 3, requires_grad=True)
    assert gather_with_gradient(x) is x
    assert rank_offset(5) == 0


def test_evaluation_is_that_of_one_process(ranks):
    expected = evaluation(torch.arange(EVALUATED)).compute()
    assert expected["samples"] == EVALUATED
    for found in ranks:
        assert found["evaluation"] == found["padded"] == expected
