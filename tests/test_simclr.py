"""SimCLR: parts of a batch, ranks, the command line, and weights that other commands load."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_modules.backbones.checkpoints import load_weights
from lightning_modules.backbones.factory import create_backbone
from lightning_modules.classification import Classification
from lightning_modules.errors import ModelError
from lightning_modules.global_norm import GlobalBatchNorm1d
from lightning_modules.simclr import SimCLR

ROOT = Path(__file__).parent.parent
LAYER_NORM = "test_convnext"

CONFIG = """
trainer: {accelerator: cpu, devices: 1, enable_progress_bar: false, log_every_n_steps: 1, max_epochs: 2}
model:
  class_path: SimCLR
  init_args: {backbone: test_resnet, projection: [32, 16]}
data:
  class_path: Synthetic
  init_args: {num_train: 60, num_test: 30, classes: 3, image_size: 16, batch_size: 16, augmented_views: 2,
    transform: inception_crop}
"""


def tiny(images_at_once=None, backbone="test_resnet"):
    torch.manual_seed(0)
    return SimCLR(backbone=backbone, projection=[24, 8], images_at_once=images_at_once).double()


def views(count=6, side=32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator) for _ in range(2)]


def gradients(model, batch):
    model.zero_grad()
    loss = model.training_loss(model.normalise(batch["image"]), batch)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_parts_of_a_batch_give_the_gradients_of_the_whole():
    first, second = views()
    batch = {"image": first, "view2": second}
    loss, whole = gradients(tiny(backbone=LAYER_NORM), batch)
    parted_loss, parted = gradients(tiny(5, backbone=LAYER_NORM), batch)
    torch.testing.assert_close(parted_loss, loss, rtol=1e-9, atol=1e-9)
    assert whole.keys() == parted.keys()
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for name, gradient in whole.items():
        assert float((parted[name] - gradient).abs().max()) <= 1e-8 * largest, name


def test_the_second_pass_over_a_part_does_not_move_running_statistics():
    first, second = views()
    model, expected = tiny(4), tiny()
    gradients(model, {"image": first, "view2": second})
    norm, other = (net.backbone.bn1 for net in (model, expected))
    with torch.no_grad():
        both = torch.cat([model.normalise(first), model.normalise(second)])
        for part in both.split(4):  # each part once
            expected.encode(part)
    assert int(norm.num_batches_tracked) == 3
    torch.testing.assert_close(norm.running_mean, other.running_mean)
    torch.testing.assert_close(norm.running_var, other.running_var)
    assert norm.momentum == 0.1


def test_no_part_is_left_with_a_single_image():
    model, (first, second) = (
        SimCLR(backbone="resnet18", projection=[8, 4], images_at_once=3),
        views(2),
    )  # the last maps have one pixel
    gradients(model, {"image": first, "view2": second})
    assert int(model.backbone.bn1.num_batches_tracked) == 2


def test_parts_go_with_batch_norm_over_devices():
    first, second = views(4)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(tiny(4))
    gradients(model, {"image": first, "view2": second})
    assert int(model.backbone.bn1.num_batches_tracked) == 2


def test_parts_hold_the_activations_of_one_part_only():
    def kept(images_at_once):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        first, second = views(16)
        model = tiny(images_at_once)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.training_loss(model.normalise(first), {"image": first, "view2": second})
        return sum(sizes)

    # What the forward pass leaves behind: the images of the parts and the projection, not the network's activations.
    assert kept(4) < 0.25 * kept(None)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"projection": []}, r"projection is \[\]"),
        ({"projection": [8, 0]}, "projection is"),
        ({"images_at_once": 0}, "images_at_once is 0"),
    ],
)
def test_arguments_out_of_range(arguments, match):
    with pytest.raises(ModelError, match=match):
        SimCLR(backbone="test_resnet", **arguments)


def test_one_view_is_an_error_that_says_what_to_set():
    model = tiny()
    with pytest.raises(ModelError, match="two views") as error:
        model.training_loss(torch.zeros(2, 3, 16, 16).double(), {"image": torch.zeros(2, 3, 16, 16)})
    assert "augmented_views: 2" in str(error.value)


def test_biases_and_norms_do_not_decay():
    decayed, bare = tiny().parameter_groups()
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert "weight_decay" not in decayed
    assert bare["weight_decay"] == 0.0
    assert all(parameter.ndim <= 1 for parameter in bare["params"])
    assert sum(len(group["params"]) for group in (decayed, bare)) == len(list(tiny().parameters()))


def test_norm_of_one_rank_is_batch_norm():
    torch.manual_seed(0)
    ours, plain, x = GlobalBatchNorm1d(5), nn.BatchNorm1d(5), torch.randn(8, 5)
    assert torch.equal(ours(x), plain(x))
    with pytest.raises(ModelError, match="batch of one"):
        ours(x[:1])


TWO_RANKS = """
import sys, torch, torch.distributed as dist
from lightning_modules.simclr import SimCLR
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
state = torch.load(f"{folder}/in.pt", weights_only=True)
model = SimCLR(backbone="test_convnext", projection=[24, 8]).double()
model.load_state_dict(state["model"])
first, second = (view[rank::2] for view in (state["first"], state["second"]))
loss = model.training_loss(model.normalise(first), {"image": first, "view2": second})
loss.backward()
loss = loss.detach()
dist.all_reduce(loss)
found = {}
for name, parameter in model.named_parameters():
    dist.all_reduce(parameter.grad)
    found[name] = parameter.grad / 2
if rank == 0:
    torch.save({"loss": loss / 2, "gradients": found, "model": model.state_dict()}, f"{folder}/out.pt")
"""


def test_two_ranks_are_one(tmp_path):
    model, (first, second) = tiny(backbone=LAYER_NORM), views(8)
    torch.save({"model": model.state_dict(), "first": first, "second": second}, tmp_path / "in.pt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", TWO_RANKS, str(rank), str(tmp_path)], cwd=ROOT, env=environment)
        for rank in range(2)
    ]
    loss, whole = gradients(model, {"image": first, "view2": second})
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    torch.testing.assert_close(found["loss"], loss, rtol=1e-9, atol=1e-9)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for name, gradient in whole.items():
        assert float((found["gradients"][name] - gradient).abs().max()) <= 1e-8 * largest, name
    for name in ("projector.1.running_mean", "projector.1.running_var"):
        torch.testing.assert_close(found["model"][name], model.state_dict()[name])


def test_the_command_line_trains_and_weights_load_without_conversion(run_cli, tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(CONFIG)
    words = ["fit", "--config", config, "--runs_dir", tmp_path]
    assert run_cli(*words, "--run", "views")[0] == 0
    run = tmp_path / "tiny" / "views"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["run"]["method"] == "simclr"
    assert {row["name"] for row in summary["validation"]} == {"loss", "matched"}
    report = load_weights(create_backbone("test_resnet", 3), run)
    assert not report.unexpected
    assert set(report.reinitialised) | set(report.missing) == {"fc.weight", "fc.bias"}
    transfer = tmp_path / "transfer.yaml"
    transfer.write_text(
        CONFIG.replace("SimCLR", "Classification")
        .replace("projection: [32, 16]", f"weights: {run}")
        .replace("augmented_views: 2", "augmented_views: null")
    )
    fit = ["fit", "--config", transfer, "--runs_dir", tmp_path, "--run", "target", "--evaluate", "true"]
    assert run_cli(*fit)[0] == 0
    row = json.loads((tmp_path / "transfer" / "target" / "summary.json").read_text())["rows"][0]
    assert row["method"] == "simclr"
    assert row["source"] == "synthetic"
    # Accumulating would leave negatives out.
    code, _, text = run_cli(*words, "--run", "parts", "--data.init_args.max_batch_per_device", "8")
    assert code == 2
    assert "images_at_once" in text
    code, _, text = run_cli("test", "--run", run)
    assert code == 2
    assert "no outputs to test" in text


def test_data_without_classes_has_nothing_to_classify():
    with pytest.raises(ModelError, match="the data has no classes"):
        Classification("test_resnet", 0, "multiclass")
