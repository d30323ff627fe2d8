"""The heads of the probe against scikit-learn and slow loops."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge, RidgeCV
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import StandardScaler, normalize

from datamodules.errors import DataError
from studies import eigenbasis, logistic
from studies.probe_heads import ALPHAS, HEADS, NEIGHBOURS

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]
# n, D: more images than features, fewer, and as many.
SHAPES = [(90, 12), (40, 150), (30, 30)]
# What is used where nothing can be chosen, by the number of features.
DEFAULTS = {
    "ridge": lambda width: (float(width),),
    "logistic": lambda width: (width / 4,),
    "prototype": lambda _: None,
    "knn": lambda _: (1.0,),
}


def make_data(n, width, classes=3, seed=0, m=50, noise=2.0):
    """Features float32 of correlated noise far from zero around class means, and labels; train and test."""
    rng = np.random.default_rng(seed)
    means, mixing = rng.normal(size=(classes, width)), rng.normal(size=(width, width)) / np.sqrt(width)
    scale, offset = np.exp(rng.normal(size=width) / 2), rng.normal(size=width) * 5

    def draw(labels):
        return ((means[labels] + noise * rng.normal(size=(len(labels), width)) @ mixing) * scale + offset).astype("f4")

    train = np.concatenate([np.arange(classes), np.arange(classes), rng.integers(classes, size=n - 2 * classes)])
    test = rng.integers(classes, size=m)
    return draw(train), train, draw(test), test


def run(head, x, y, test, *, task="multiclass", device="cpu", groups=None):
    classes = int(y.max()) + 1 if task == "multiclass" else y.shape[1]
    tensors = [torch.from_numpy(a).to(device) for a in (x, y, test)]
    groups = None if groups is None else torch.from_numpy(groups)
    result = HEADS[head](*tensors, num_classes=classes, task=task, groups=groups)
    assert result.scores.device.type == device
    return result.scores.cpu().numpy(), result.regularisation


def standardised(x, test):
    scaler = StandardScaler().fit(x.astype("f8"))
    return scaler.transform(x.astype("f8")), scaler.transform(test.astype("f8"))


def as_label(y):
    return (y == 0).astype("f4")[:, None]


# Against scikit-learn ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "width"), SHAPES)
def test_ridge_is_ridge_cv(n, width, device):
    x, y, test, _ = make_data(n, width)
    z, z_test = standardised(x, test)
    oracle = RidgeCV(alphas=width * np.array(ALPHAS)).fit(z, 2 * np.eye(3)[y] - 1)
    scores, (alpha,) = run("ridge", x, y, test, device=device)
    assert alpha == pytest.approx(oracle.alpha_)
    np.testing.assert_allclose(scores, oracle.predict(z_test), atol=1e-8)

    oracle = RidgeCV(alphas=width * np.array(ALPHAS)).fit(z, 2 * as_label(y)[:, 0] - 1)
    scores, (alpha,) = run("ridge", x, as_label(y), test, task="binary", device=device)
    assert alpha == pytest.approx(oracle.alpha_)
    np.testing.assert_allclose(scores[:, 0], oracle.predict(z_test), atol=1e-8)


@pytest.mark.parametrize(("n", "width"), [(30, 10), (16, 60)])
def test_ridge_penalty_has_the_least_error_when_each_image_is_left_out(n, width):
    x, y, test, _ = make_data(n, width, noise=4.0)
    z, _ = standardised(x, test)
    targets = 2 * np.eye(3)[y] - 1
    errors = []
    for alpha in ALPHAS:
        error = 0.0
        for i in range(n):
            rest = np.arange(n) != i
            fit = Ridge(alpha=width * alpha).fit(z[rest], targets[rest])
            error += ((fit.predict(z[i : i + 1]) - targets[i]) ** 2).sum()
        errors.append(error)
    _, (alpha,) = run("ridge", x, y, test)
    assert alpha == pytest.approx(width * ALPHAS[int(np.argmin(errors))])
    assert 0 < np.argmin(errors) < len(ALPHAS) - 1  # or the test would say little


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "width"), SHAPES)
@pytest.mark.parametrize("classes", [2, 3, 6])
def test_logistic_is_logistic_regression(n, width, classes, device):
    x, y, test, _ = make_data(n, width, classes)
    z, z_test = standardised(x, test)
    scores, (strength,) = run("logistic", x, y, test, device=device)
    oracle = LogisticRegression(C=1 / strength, solver="lbfgs", tol=1e-12, max_iter=20_000).fit(z, y)
    probabilities = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
    np.testing.assert_allclose(probabilities, oracle.predict_proba(z_test), atol=1e-4)


@pytest.mark.filterwarnings("ignore:Line search of Newton solver")  # it then goes on with L-BFGS
@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("classes", [1, 4])
def test_logistic_fit_at_any_penalty(unit, classes):
    x, y, _, _ = make_data(60, 40, 4, noise=1.0)
    z, _ = standardised(x, x)
    strength = unit * 40 / 4
    known = as_label(y)[:, 0] if classes == 1 else y
    targets = torch.from_numpy((known[:, None] if classes == 1 else np.eye(4)[y]).astype("f8"))[:, None]
    basis = eigenbasis.Eigenbasis(eigenbasis.Rows(torch.from_numpy(x)))
    found = logistic.fit_logistic(basis, targets, torch.tensor([strength], dtype=torch.float64))
    logits = logistic.linear(basis, found)[:, 0].numpy()
    solver = LogisticRegression(C=1 / strength, solver="newton-cholesky", tol=1e-12, max_iter=500)
    expected = solver.fit(z, known).decision_function(z).reshape(len(z), -1)
    centred = [a - a.mean(axis=1, keepdims=True) if classes > 1 else a for a in (logits, expected)]
    np.testing.assert_allclose(*centred, atol=1e-4)


def test_logistic_penalty_has_the_least_held_out_loss():
    x, y, test, _ = make_data(60, 20, noise=4.0)
    z, _ = standardised(x, test)
    folds = list(StratifiedKFold(5, shuffle=True, random_state=logistic.FOLD_SEED).split(z, y))
    losses = []
    for strength in logistic.STRENGTHS:
        model = LogisticRegression(C=4 / (20 * strength), tol=1e-8, max_iter=5000)
        held_out = [model.fit(z[a], y[a]).predict_proba(z[b]) for a, b in folds]
        losses.append(sum(log_loss(y[b], p, normalize=False) for (_, b), p in zip(folds, held_out, strict=True)))
    best = int(np.argmin(losses))
    assert 0 < best < len(losses) - 1
    assert run("logistic", x, y, test)[1] == (pytest.approx(20 / 4 * logistic.STRENGTHS[best]),)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "width"), SHAPES)
def test_prototype_is_nearest_centroid(n, width, device):
    x, y, test, _ = make_data(n, width)
    z, z_test = map(normalize, standardised(x, test))
    scores, chosen = run("prototype", x, y, test, device=device)
    assert chosen is None
    assert (scores.argmax(axis=1) == NearestCentroid().fit(z, y).predict(z_test)).all()
    means = np.stack([z[y == c].mean(axis=0) for c in range(3)])
    distances = np.linalg.norm(z_test[:, None] - means, axis=2)
    np.testing.assert_allclose(scores, -distances, atol=1e-7)

    label, _ = run("prototype", x, as_label(y), test, task="binary", device=device)
    others = z[y != 0].mean(axis=0)
    np.testing.assert_allclose(label[:, 0], np.linalg.norm(z_test - others, axis=1) - distances[:, 0], atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "width"), SHAPES)
def test_knn_is_k_neighbors_classifier(n, width, device):
    x, y, test, _ = make_data(n, width)
    z, z_test = map(normalize, standardised(x, test))
    errors = {}
    for k in (k for k in NEIGHBOURS if k < n):
        model, errors[k] = KNeighborsClassifier(k), 0.0
        for i in range(n):
            rest = np.arange(n) != i
            shares = (z[i] @ z[rest].T).argsort()[::-1][:k]
            errors[k] += ((np.eye(3)[y[rest][shares]].mean(axis=0) - np.eye(3)[y[i]]) ** 2).sum()
    scores, (k,) = run("knn", x, y, test, device=device)
    assert k == min(errors, key=errors.__getitem__)
    oracle = KNeighborsClassifier(int(k)).fit(z, y)
    np.testing.assert_allclose(scores, oracle.predict_proba(z_test), atol=1e-12)

    label, (k,) = run("knn", x, as_label(y), test, task="binary", device=device)
    model = KNeighborsClassifier(int(k)).fit(z, y == 0)
    np.testing.assert_allclose(label[:, 0], 2 * model.predict_proba(z_test)[:, 1] - 1, atol=1e-12)


# All heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", HEADS)
def test_every_label_is_learnt_by_itself_where_it_is_known(head):
    x, y, test, _ = make_data(60, 15)
    labels = np.stack([y == 0, y == 1, y == 2, y == 0, y < 0], axis=1).astype("f4")
    labels[5:30, 1] = np.nan
    labels[40:50, 2:4] = np.nan
    scores, chosen = run(head, x, labels, test, task="multilabel")
    assert scores.shape == (50, 5)
    for column in range(4):
        known = ~np.isnan(labels[:, column])
        alone, its = run(head, x[known], labels[known][:, [column]], test, task="binary")
        np.testing.assert_allclose(scores[:, [column]], alone, atol=1e-4)
        assert chosen is None or chosen[column] == pytest.approx(its[0])
    assert (scores[:, 4] == -1).all()


@pytest.mark.parametrize("head", HEADS)
def test_constant_labels(head):
    x, _, test, _ = make_data(20, 5)
    labels = np.stack([np.ones(20), np.zeros(20), np.full(20, np.nan)], axis=1).astype("f4")
    labels[:4, 0] = np.nan
    scores, chosen = run(head, x, labels, test, task="multilabel")
    assert (scores == [1, -1, 0]).all()
    assert chosen is None if head == "prototype" else np.isnan(chosen).all()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("n", "width"), [(90, 12), (40, 150)])
def test_chunks_change_nothing(head, n, width, monkeypatch):
    x, y, test, _ = make_data(n, width)
    labels = np.stack([y == 0, y == 1], axis=1).astype("f4")
    labels[:7, 1] = np.nan
    whole = [run(head, x, y, test), run(head, x, labels, test, task="multilabel")]
    monkeypatch.setattr(eigenbasis, "CHUNK_ROWS", 7)
    monkeypatch.setattr(eigenbasis, "STORED_NUMBERS", 0)
    parts = [run(head, x, y, test), run(head, x, labels, test, task="multilabel")]
    for (expected, chosen), (found, its) in zip(whole, parts, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert chosen == (its if its is None else pytest.approx(its))


@pytest.mark.parametrize("head", HEADS)
def test_one_image_a_class(head):
    x, y, test, truth = make_data(30, 40, 5, m=200, noise=0.5)
    first = np.unique(y, return_index=True)[1]
    scores, chosen = run(head, x[first], y[first], test)
    assert chosen == DEFAULTS[head](40)
    assert (scores.argmax(axis=1) == truth).mean() > 0.7
    pair, _ = run(head, x[first[:2]], as_label(y[first[:2]]), test, task="binary")
    own = (truth == 0) | (truth == 1)
    assert ((pair[own, 0] > 0) == (truth[own] == 0)).mean() > 0.7


@pytest.mark.parametrize("head", HEADS)
def test_an_image_is_scored_by_itself_and_in_float64(head):
    x, y, test, _ = make_data(60, 15)
    scores, _ = run(head, x, y, test)
    np.testing.assert_allclose(run(head, x, y, test[:1])[0], scores[:1], atol=1e-12)
    np.testing.assert_allclose(run(head, x.astype("f8"), y, test.astype("f8"))[0], scores, atol=1e-12)
    assert scores.dtype == np.float64
    assert run(head, x, y, test[:0])[0].shape == (0, 3)


@pytest.mark.parametrize("head", HEADS)
def test_scale_and_place_of_the_features_do_not_matter(head):
    x, y, test, _ = make_data(60, 15)
    scores, _ = run(head, x.astype("f8"), y, test.astype("f8"))
    factor = np.exp(np.random.default_rng(1).normal(size=15) / 2)
    moved, _ = run(head, x * factor * 1e-3 + 7, y, test * factor * 1e-3 + 7)
    np.testing.assert_allclose(moved, scores, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("n", "width"), [(60, 15), (20, 60)])
def test_constant_features_are_ignored_whatever_they_are_elsewhere(head, n, width):
    x, y, test, _ = make_data(n, width)
    scores, _ = run(head, x, y, test)
    constant = np.full((n, 1), 0.1, dtype="f4")  # not a dyadic number: its mean is off by the last digit
    wild = np.random.default_rng(0).normal(size=(len(test), 1)).astype("f4") * 1e6
    found, _ = run(head, np.hstack([x, constant]), y, np.hstack([test, wild]))
    if head in ("prototype", "knn"):
        np.testing.assert_allclose(found, scores, atol=1e-6)
    else:  # whose penalties are in units of the number of features
        assert (found.argmax(axis=1) == scores.argmax(axis=1)).mean() > 0.95
        assert np.abs(found).max() < 2 * np.abs(scores).max()


@pytest.mark.parametrize("head", HEADS)
def test_equal_images_get_equal_scores(head):
    for n, width in ((30, 4), (4, 30)):
        x = np.full((n, width), 0.1, dtype="f4")
        test = np.random.default_rng(0).normal(size=(5, width)).astype("f4")
        scores, _ = run(head, x, np.arange(n) % 2, test)
        assert np.isfinite(scores).all()
        np.testing.assert_allclose(scores, scores[:1].repeat(5, axis=0))


@pytest.mark.parametrize("head", HEADS)
def test_repeated_images(head):
    x, y, test, truth = make_data(12, 40, noise=0.5)
    scores, _ = run(head, np.tile(x, (5, 1)), np.tile(y, 5), test)
    assert np.isfinite(scores).all()
    assert (scores.argmax(axis=1) == truth).mean() > 0.8


@pytest.mark.parametrize("head", HEADS)
def test_bad_input(head):
    x, y, test, _ = make_data(20, 6)
    broken = x.copy()
    broken[13, 4] = np.nan
    with pytest.raises(DataError, match=r"training features hold nan\n.*row 13, column 4"):
        run(head, broken, y, test)
    broken = test.copy()
    broken[2, 1] = -np.inf
    with pytest.raises(DataError, match=r"test features hold -inf\n.*row 2, column 1"):
        run(head, x, y, broken)
    with pytest.raises(DataError, match="2 of 5 classes have no training image: class 1, 3"):
        run(head, x, np.array([0, 2, 4, 4] * 5), test)
    with pytest.raises(DataError, match=r"a label is -1\n.*row 19"):
        run(head, x, np.append(y[:19], -1), test)
    with pytest.raises(DataError, match=r"a label is 0.5\n.*row 3"):
        run(head, x, np.where(np.arange(20) == 3, 0.5, as_label(y)[:, 0])[:, None], test, task="binary")
    with pytest.raises(DataError, match=r"training features have 6 columns, test features 5"):
        run(head, x, y, test[:, :5])
    with pytest.raises(DataError, match=r"torch.int64 of shape \(20,\)"):
        HEADS[head](*map(torch.from_numpy, (x, y, test)), num_classes=3, task="multilabel")
    with pytest.raises(DataError, match=r"torch.float32 of shape \(20,\)"):
        run(head, x[:, 0], y, test)
    with pytest.raises(DataError, match=r"shape \(0,\)"):
        HEADS[head](*map(torch.from_numpy, (x[:0], y[:0], test)), num_classes=3, task="multiclass")
