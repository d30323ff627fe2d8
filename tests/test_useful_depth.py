"""The useful depth of a transfer, where the generator makes it known: a sweep over frozen layers has to find it.

Everything shared: the source's network is the target's, so all its layers, frozen, are best. Nothing shared but the
look: only the first layers are of use, and freezing all of them costs accuracy. Measured here (accuracy in %, mean of 3
seeds, 50 images a class, frozen depth 0 to 5; standard deviations are 0.3 to 2, with one or no layer frozen up to 8):
    everything shared  26.5  55.1  62.0  75.0  77.5  78.3
    nothing shared     35.1  57.1  52.3  49.1  48.0  45.2
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from datamodules.generator import ImageGenerator

CLASSES, SHOTS, SEEDS = 10, 50, 3
LAYERS = ((3, 16, 2), (16, 24, 2), (24, 32, 1), (32, 48, 2), (48, 64, 1))  # channels in and out, stride


def network(seed):
    """Layer groups from input to output, and a classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        groups = [
            nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
            for inputs, outputs, stride in LAYERS
        ]
        return groups, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(LAYERS[-1][1], CLASSES))


def draw(generator, start, count):
    index = start + np.arange(count)
    images = torch.from_numpy(generator.images(index)).permute(0, 3, 1, 2)
    return (images.float() / 255 - 0.5) / 0.25, torch.from_numpy(generator.labels(index))


def train(layers, images, labels, steps, batch, lr, seed):
    """SGD with a cosine schedule after a tenth of warm-up."""
    order = torch.Generator().manual_seed(seed)
    net = nn.Sequential(*layers).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4, fused=True)
    warm_up = steps // 10
    for step in range(steps):
        cosine = 0.5 + 0.5 * np.cos(np.pi * max(0, step - warm_up) / (steps - warm_up))
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / warm_up, cosine)
        chosen = torch.randint(len(labels), (batch,), generator=order)
        optimizer.zero_grad()
        cross_entropy(net(images[chosen]), labels[chosen]).backward()
        optimizer.step()


@torch.no_grad()
def outputs(layers, images):
    net = nn.Sequential(*layers).eval()
    return torch.cat([net(part) for part in images.split(256)])


def sweep(pretrained, target):
    """Test accuracy in % by seed and frozen depth k: the first k groups come from the source, the rest start anew."""
    test, truth = draw(target, 1 << 40, 500)
    accuracy = np.zeros((SEEDS, len(LAYERS) + 1))
    for seed in range(SEEDS):
        few, labels = draw(target, seed * SHOTS * CLASSES, SHOTS * CLASSES)  # exactly SHOTS a class
        features = test
        for depth in range(len(LAYERS) + 1):
            if depth:  # what is frozen is computed once
                few, features = (outputs(pretrained[depth - 1 : depth], part) for part in (few, features))
            groups, classifier = network(1 + seed)
            layers = [*groups[depth:], classifier]
            train(layers, few, labels, steps=80, batch=32, lr=0.05, seed=seed)
            accuracy[seed, depth] = 100 * (outputs(layers, features).argmax(1) == truth).float().mean()
    return accuracy


@pytest.fixture(scope="module")
def pretrained():
    groups, classifier = network(0)
    images, labels = draw(ImageGenerator(num_classes=CLASSES), 0, 4000)
    train([*groups, classifier], images, labels, steps=200, batch=64, lr=0.1, seed=0)
    return groups


def target(share):
    return ImageGenerator(
        num_classes=CLASSES, role="target", similarity=share, shared_features=share, shared_rule=share
    )


def test_with_everything_shared_all_layers_are_useful(pretrained):
    accuracy = sweep(pretrained, target(1.0))
    mean = accuracy.mean(0)
    assert mean[-1] > mean[:-1].max() - 1, accuracy  # at least as good as any, up to the noise of the last two
    assert mean[-1] > mean[:-2].max() + 1, accuracy
    assert (accuracy[:, -1] > accuracy[:, 1] + 8).all(), accuracy


def test_with_nothing_shared_only_the_first_layers_are_useful(pretrained):
    accuracy = sweep(pretrained, target(0.0))
    mean = accuracy.mean(0)
    assert 1 <= mean.argmax() <= 2, accuracy
    best = accuracy[:, mean.argmax()]
    assert (best > accuracy[:, -1] + 5).all(), accuracy
    assert (best > accuracy[:, 0] + 5).all(), accuracy
    lost = best - accuracy[:, -1]
    assert lost.mean() > 4 * lost.std(ddof=1) / np.sqrt(SEEDS), accuracy
