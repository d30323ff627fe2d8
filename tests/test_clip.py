"""CLIP: gradients in parts, the temperature, the checkpoint with both towers, and heads made of texts."""

import json
import math

import pytest
import torch
from PIL import Image

from lightning_modules.classification import Classification
from lightning_modules.clip import CLIP, load_clip
from lightning_modules.errors import ModelError
from lightning_modules.text.transformer import SmallText
from lightning_modules.text_head import class_embeddings, set_text_head, zero_shot_logits

TEXT = {"vocabulary": 64, "context": 8, "width": 16, "layers": 1, "heads": 2}
CAPTIONS = ["a photo of a cat.", "a dog", "two birds in a tree", "a red car", "one boat", "a house by the sea"]


def tiny(images_at_once=None, backbone="test_resnet"):
    torch.manual_seed(0)
    return CLIP(backbone=backbone, text=SmallText(**TEXT), embedding=12, images_at_once=images_at_once)


def images(count=6):
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def gradients(model, batch):
    loss = model.training_loss(model.normalise(batch["image"]), batch)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_parts_of_a_batch_give_the_gradients_of_the_whole():
    batch = {"image": images(), "text": CAPTIONS}
    loss, whole = gradients(tiny(backbone="test_convnext").double(), batch)
    parted_loss, parted = gradients(tiny(4, backbone="test_convnext").double(), batch)
    torch.testing.assert_close(parted_loss, loss, rtol=1e-9, atol=1e-9)
    largest = max(float(gradient.abs().max()) for gradient in whole.values())
    for name, gradient in whole.items():
        assert gradient is not None, name
        assert float((parted[name] - gradient).abs().max()) <= 1e-8 * largest, name


def test_parts_hold_the_activations_of_one_part_only():
    def kept(images_at_once):
        sizes = []
        model, batch = tiny(images_at_once), {"image": images(16), "text": [*CAPTIONS, *CAPTIONS, *CAPTIONS[:4]]}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model.training_loss(model.normalise(batch["image"]), batch)
        with_text = sum(sizes)
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            model.embed_texts(batch["text"])
        return with_text, sum(sizes)

    (whole, whole_text), (parts, parts_text) = kept(None), kept(4)
    assert parts < 0.25 * whole
    assert parts_text < 0.25 * whole_text


def test_runs_can_be_selected_by_all_that_validation_gives():
    ways = ("image_to_text", "text_to_image")
    recalls = [f"validation/recall_at_{k}/{way}" for way in ways for k in (1, 5)]
    assert tiny().metric_names("validation") == ["validation/loss", "validation/matched", *recalls]


def test_the_temperature_cannot_overflow():
    model = tiny()
    with torch.no_grad():
        model.log_scale.fill_(200.0)  # exp(200) is infinite in float32
    loss, found = gradients(model, {"image": images(), "text": CAPTIONS})
    assert math.isfinite(float(loss))
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())


def test_batches_without_captions_say_what_to_set():
    with pytest.raises(ModelError, match="caption for every image") as error:
        tiny().training_loss(torch.zeros(2, 3, 32, 32), {"image": torch.zeros(2, 3, 32, 32)})
    assert "data.init_args.captions" in str(error.value)


CONFIG = """
trainer: {accelerator: cpu, devices: 1, enable_progress_bar: false, log_every_n_steps: 1, max_epochs: 12}
model:
  class_path: CLIP
  init_args:
    backbone: test_resnet
    embedding: 12
    text: {class_path: SmallText, init_args: {vocabulary: 64, context: 12, width: 16, layers: 1, heads: 2}}
    lr_scheduler: {class_path: ConstantSchedule}
data:
  class_path: Synthetic
  init_args: {num_train: 600, num_test: 120, classes: 3, image_size: 16, batch_size: 32,
    captions: ["a photo of a {}.", "some {}"]}
"""
TRANSFER = """
trainer: {accelerator: cpu, devices: 1, enable_progress_bar: false, max_steps: 1}
model:
  class_path: Classification
  init_args:
    backbone: test_resnet
    weights: WEIGHTS
    head_init: text
    frozen_depth: -1 # else one step would move the running statistics of the norms
    optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.0}}
data:
  class_path: Synthetic
  init_args: {num_train: 600, num_test: 120, classes: 3, image_size: 16, batch_size: 32,
    captions: ["a photo of a {}.", "some {}"]}
"""


def read(folder):
    return json.loads((folder / "summary.json").read_text())


def test_the_command_line_trains_names_classes_and_transfers(run_cli, tmp_path):
    config = tmp_path / "pairs.yaml"
    config.write_text(CONFIG)
    assert run_cli("fit", "--config", config, "--runs_dir", tmp_path, "--run", "clip")[0] == 0
    run = tmp_path / "pairs" / "clip"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scales = [line["train/scale"] for line in lines if "train/scale" in line]
    assert scales[0] != scales[-1]  # it is learned
    assert {line["train/captions_cut"] for line in lines if "train/captions_cut" in line} == {0.0}
    assert {row["name"] for row in read(run)["validation"]} == {"loss", "matched", "recall_at_1", "recall_at_5"}
    code, out, _ = run_cli("zero-shot", "--run", run, "--data", config)
    assert code == 0, out
    (place,) = (run / "zero_shot").iterdir()
    rows = {row["metric"]: row for row in read(place)["rows"] if not row["class_name"]}
    assert rows["accuracy"]["protocol"] == "zero_shot"
    assert rows["accuracy"]["method"] == "clip"
    assert rows["accuracy"]["value"] > 0.45  # of three classes
    # The same words as a classifier to begin with: at rate 0 it says what zero-shot said.
    transfer = tmp_path / "transfer.yaml"
    transfer.write_text(TRANSFER.replace("WEIGHTS", str(run)))
    words = ["fit", "--config", transfer, "--runs_dir", tmp_path, "--run", "head", "--evaluate", "true"]
    assert run_cli(*words, "--data.init_args.transform", "resize_center")[0] == 0
    row = next(row for row in read(tmp_path / "transfer" / "head")["rows"] if row["metric"] == "accuracy")
    assert row["value"] == pytest.approx(rows["accuracy"]["value"])
    assert row["method"] == "clip"
    Image.new("RGB", (20, 20)).save(tmp_path / "image.png")
    code, _, text = run_cli("predict", "--run", run, "--input", tmp_path)
    assert code == 2
    assert "names no classes" in text


def test_a_head_of_texts_ranks_classes_as_zero_shot_does(tmp_path):
    model = tiny().eval()
    path = tmp_path / "clip.ckpt"
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": model.hyper_parameters()}, path)
    texts = [["a cat", "some cat"], ["a dog", "some dog"], ["a boat", "some boat"], ["a red car", "some red car"]]
    loaded = load_clip(path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    batch = model.normalise(images())
    expected = zero_shot_logits(loaded, batch, class_embeddings(loaded, texts))
    net = Classification(
        "test_resnet", 4, "multiclass", ["cat", "dog", "boat", "car"], weights=str(path), head_init="text",
        class_texts=texts,
    ).eval()  # fmt: skip
    found = net(net.normalise(images()))
    assert torch.equal(found.argmax(dim=1), expected.argmax(dim=1))
    ratio = (found / expected).detach()  # one factor an image: the length of its embedding
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3, atol=0)


def test_heads_of_texts_want_a_clip_run_and_texts(tmp_path):
    arguments = {"backbone": "test_resnet", "num_classes": 2, "task": "multiclass", "head_init": "text"}
    with pytest.raises(ModelError, match="head_init text needs"):
        Classification(**arguments)
    other = Classification("test_resnet", 2, "multiclass")
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": other.state_dict(), "hyper_parameters": other.hyper_parameters()}, path)
    with pytest.raises(ModelError, match="no text tower"):
        Classification(**arguments, weights=str(path), class_texts=[["a"], ["b"]])
    clip = tiny()
    torch.save({"state_dict": clip.state_dict(), "hyper_parameters": clip.hyper_parameters()}, path)
    with pytest.raises(ModelError, match="one linear classifier"):
        set_text_head(Classification("test_resnet", 2, "multiclass").backbone, str(path), [["a"], ["b"], ["c"]])
