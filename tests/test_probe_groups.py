"""Heads of the probe where patients have several images: against slow loops that leave whole patients out."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss
from sklearn.model_selection import LeaveOneGroupOut, StratifiedGroupKFold
from sklearn.preprocessing import normalize

from datamodules.errors import DataError
from studies import eigenbasis, logistic
from studies.probe_heads import ALPHAS, HEADS, NEIGHBOURS
from tests.test_probe_heads import DEFAULTS, DEVICES, make_data, run, standardised


def patients(n=60, width=15):
    """Images of one patient, who has several, share much of their features and the class; and each image's patient."""
    x, _, test, _ = make_data(n, width, noise=3.0)
    rng = np.random.default_rng(0)
    owner = np.sort(rng.integers(n // 4, size=n)) * 7 + 100
    owner[:8] = owner[0]  # one with many
    own = rng.normal(size=(owner.max() + 1, width)).astype("f4")
    shuffle = rng.permutation(n)
    return (x + 4 * x.std(axis=0) * own[owner])[shuffle], (owner // 7 % 3)[shuffle], test, owner[shuffle]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numbers", [2**25, 0])
@pytest.mark.parametrize(("n", "width"), [(60, 4), (60, 15), (40, 80)])
def test_ridge_leaves_out_whole_groups(n, width, numbers, device, monkeypatch):
    monkeypatch.setattr(eigenbasis, "STORED_NUMBERS", numbers)
    monkeypatch.setattr(eigenbasis, "CHUNK_ROWS", 9)
    x, y, test, owner = patients(n, width)
    z, _ = standardised(x, test)
    targets = 2 * np.eye(3)[y] - 1
    errors = np.zeros(len(ALPHAS))
    for rest, out in LeaveOneGroupOut().split(z, y, owner):
        fits = [Ridge(alpha=width * alpha).fit(z[rest], targets[rest]) for alpha in ALPHAS]
        errors += [((fit.predict(z[out]) - targets[out]) ** 2).sum() for fit in fits]
    rows = eigenbasis.Rows(torch.from_numpy(x).to(device))
    basis = eigenbasis.Eigenbasis(rows)
    shrunk = 1 / (basis.eigenvalues[:, None] + width * basis.eigenvalues.new_tensor(ALPHAS))
    centred = torch.from_numpy(targets - targets.mean(axis=0)).to(device)
    numbers = torch.from_numpy(np.unique(owner, return_inverse=True)[1]).to(device)
    found = basis.left_out_errors(centred, shrunk, numbers).sum(dim=1).cpu().numpy()
    np.testing.assert_allclose(found, errors, rtol=1e-6)
    _, (alpha,) = run("ridge", x, y, test, groups=owner, device=device)
    assert alpha == pytest.approx(width * ALPHAS[int(np.argmin(errors))])
    assert alpha != run("ridge", x, y, test, device=device)[1][0]  # the images of one patient recognise each other


@pytest.mark.parametrize("device", DEVICES)
def test_knn_leaves_out_whole_groups(device):
    x, y, test, owner = patients()
    z = normalize(standardised(x, test)[0])
    errors = {}
    for k in (k for k in NEIGHBOURS if k <= 60 - np.unique(owner, return_counts=True)[1].max()):
        errors[k] = 0.0
        for i in range(60):
            rest = owner != owner[i]
            shares = (z[i] @ z[rest].T).argsort()[::-1][:k]
            errors[k] += ((np.eye(3)[y[rest][shares]].mean(axis=0) - np.eye(3)[y[i]]) ** 2).sum()
    assert run("knn", x, y, test, groups=owner, device=device)[1] == (min(errors, key=errors.__getitem__),)


def test_logistic_folds_divide_no_group():
    x, y, test, owner = patients()
    z, _ = standardised(x, test)
    folds = list(StratifiedGroupKFold(5, shuffle=True, random_state=logistic.FOLD_SEED).split(z, y, owner))
    losses = []
    for strength in logistic.STRENGTHS:
        model = LogisticRegression(C=4 / (15 * strength), tol=1e-8, max_iter=5000)
        held_out = [model.fit(z[a], y[a]).predict_proba(z[b]) for a, b in folds]
        losses.append(sum(log_loss(y[b], p, normalize=False) for (_, b), p in zip(folds, held_out, strict=True)))
    found = run("logistic", x, y, test, groups=owner)[1]
    assert found == (pytest.approx(15 / 4 * logistic.STRENGTHS[int(np.argmin(losses))]),)


def test_a_fold_whose_rest_lacks_a_class_chooses_nothing():
    classes, owner = np.repeat([0, 1, 2], [6, 6, 4]), np.array([0, 0, 1, 1, 2, 2, 0, 0, 1, 1, 3, 3, 4, 4, 5, 5])
    for seed in range(20):
        shuffled = np.random.default_rng(seed).permutation(16)
        targets, groups = torch.from_numpy(np.eye(3)[classes[shuffled]]), torch.from_numpy(owner[shuffled])
        folds = logistic._folds(targets, groups).numpy()
        for fold in set(folds) - {-1}:
            assert set(classes[shuffled][folds != fold]) == {0, 1, 2}
            assert not set(owner[shuffled][folds == fold]) & set(owner[shuffled][folds != fold])


@pytest.mark.parametrize("head", HEADS)
def test_groups_of_one_image_are_none_and_one_group_tells_nothing(head):
    x, y, test, owner = patients()
    scores, chosen = run(head, x, y, test)
    alone = run(head, x, y, test, groups=np.arange(60)[::-1].copy() * 3 - 50)
    np.testing.assert_array_equal(alone[0], scores)
    assert alone[1] == chosen
    assert run(head, x, y, test, groups=np.full(60, 5))[1] == DEFAULTS[head](15)
    with pytest.raises(DataError, match=r"groups are of shape \(59,\)"):
        run(head, x, y, test, groups=owner[1:])


@pytest.mark.parametrize("head", HEADS)
def test_groups_of_labels_that_are_known_for_some_images(head):
    x, y, test, owner = patients()
    labels = np.stack([y == 0, y == 1], axis=1).astype("f4")
    labels[5:30, 1] = np.nan
    known = ~np.isnan(labels[:, 1])
    scores, chosen = run(head, x, labels, test, task="multilabel", groups=owner)
    alone, its = run(head, x[known], labels[known, 1:], test, task="binary", groups=owner[known])
    np.testing.assert_allclose(scores[:, 1:], alone, atol=1e-4)
    assert chosen is None or chosen[1] == pytest.approx(its[0])
