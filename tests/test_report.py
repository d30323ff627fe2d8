import re
import struct
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest

from studies import figures
from studies.report import select_headline, write_report
from studies.report_markdown import sentence, verdict
from studies.results import ResultsError, read_csv, rows_to_frame
from studies.statistics import summarise

SHOTS = ("1", "5", "10", "100", "full")


def study(targets=("cifar10",), sources=("imagenet1k", "nih", "scratch"), shots=SHOTS, seeds=3, noise=0.02, **facts):
    rng = np.random.default_rng(0)
    return rows_to_frame(
        {
            **{"study": "s", "cell": f"{target}-{source}-{k}", "run": f"{target}-{source}-{k}-{seed}"},
            **{
                "source": source,
                "architecture": "tiny",
                "target": target,
                "protocol": "finetune",
                "shots": k,
            },
            **{"seed": seed, "metric": "test/accuracy", "code_version": "1"},
            "value": 0.3 + 0.1 * SHOTS.index(k) + 0.02 * i + noise * rng.standard_normal(),
            **facts,
        }
        for target in targets
        for i, source in enumerate(sources)
        for k in shots
        for seed in range(seeds)
    )


def golden(values, scratch):
    rows = study(sources=("nih", "scratch"), shots=("5",), seeds=len(values)).to_dict("records")
    for record, value in zip(rows, [*values, *scratch], strict=True):
        record["value"] = value
    return rows_to_frame(rows)


@pytest.fixture
def no_drawing(monkeypatch):
    """Drawing costs a second a figure and is tested below."""
    monkeypatch.setattr(figures, "few_shot_curves", lambda *_, **__: None)
    monkeypatch.setattr(figures, "save", lambda *_: ())


def text_of(frame, folder, **options):
    return write_report(frame, folder, title="Study", **options).report.read_text()


@pytest.mark.usefixtures("no_drawing")
def test_the_sentence_of_a_golden_frame(tmp_path):
    # gains 5, 1 and 3 points: mean 3, SD 2, half width 4.302653 * 2 / sqrt(3) = 4.97
    text = text_of(golden([0.35, 0.31, 0.33], [0.30, 0.30, 0.30]), tmp_path)
    assert (
        "On cifar10 at 5 shots, nih → 33.0 ± 2.0 against 30.0 ± 0.0 from scratch: +3.0 "
        "(95 % interval −2.0 to 8.0, 3 pairs): not distinguishable." in text
    )
    assert "Higher: 0, lower: 0, not distinguishable: 1, no claim" in text
    assert "| cifar10 | nih | tiny | finetune | accuracy | 33.0 ± 2.0 |" in text
    assert "| cifar10 | nih | tiny | finetune | accuracy | +3.0 [−2.0, 8.0] |" in text
    assert "over 3 seeds." in text


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize(
    ("values", "scratch", "says"),
    [
        (
            [0.35, 0.34, 0.36],
            [0.30, 0.30, 0.30],
            "+5.0 (95 % interval 2.5 to 7.5, 3 pairs): higher than scratch.",
        ),
        (
            [0.25, 0.24, 0.26],
            [0.30, 0.30, 0.30],
            "−5.0 (95 % interval −7.5 to −2.5, 3 pairs): lower than scratch.",
        ),
        (
            [0.35, 0.35],
            [0.30, 0.30],
            "+5.0 (the same in all 2 pairs): no spread gives no interval, so no claim.",
        ),
        (
            [0.35],
            [0.30],
            "nih → 35.0 against 30.0 from scratch: +5.0 (1 pair): one seed gives no interval, so no claim.",
        ),
    ],
)
def test_verdicts(tmp_path, values, scratch, says):
    assert says in text_of(golden(values, scratch), tmp_path)


@pytest.mark.usefixtures("no_drawing")
def test_one_seed_claims_nothing(tmp_path):
    text = text_of(study(seeds=1), tmp_path)
    assert "Higher: 0, lower: 0, not distinguishable: 0, no claim because the seeds give no interval: 10." in text
    assert "one seed a cell, so there is no spread" in text
    for false_here in ("higher than", "lower than", "±", "not distinguishable.", "nan ", "95 %", "1 in 20"):
        assert false_here not in text


def test_verdict_and_interval_agree():
    assert verdict({"n": 3, "low": 0.0, "high": 0.1}) == "not distinguishable"
    assert verdict({"n": 3, "low": 0.001, "high": 0.1}) == "higher than scratch"
    assert verdict({"n": 3, "low": -0.1, "high": -0.001}, "in1k") == "lower than in1k"
    row = {"target": "t", "source": "nih", "budget": "full", "mean": 0.5, "sd": 0.01, "baseline_mean": 0.4}
    row |= {"baseline_sd": 0.02, "gain": 0.1, "low": 0.0002, "high": 0.2, "n": 4, "method": "clip"}
    text = sentence(row, context=["method"])
    assert text.startswith("On t on the full training set, nih (method clip) → 50.0 ± 1.0 against 40.0 ± 2.0")
    assert "0.02 to 20.0" in text  # an interval that leaves out zero never shows a zero


@pytest.mark.usefixtures("no_drawing")
def test_tables_hold_all_cells_in_natural_order(tmp_path):
    frame = study(targets=("pets", "cifar10"), shots=("full", "100", "5", "10", "1"))
    frame = frame[~((frame["source"] == "nih") & (frame["shots"] == "10"))]
    frame = frame[~((frame["source"] == "nih") & (frame["shots"] == "100") & (frame["seed"] > 1))]
    report = write_report(frame, tmp_path, title="Study")
    lines = report.summary_md.read_text().splitlines()
    assert lines[4] == "| target | source | architecture | protocol | metric | 1 | 5 | 10 | 100 | full |"
    nih = next(line for line in lines if line.startswith("| cifar10 | nih |"))
    cells = [cell.strip() for cell in nih.split("|")][6:11]
    assert cells[2] == "–"
    assert re.fullmatch(r"\d+\.\d ± \d+\.\d \(n = 2\)", cells[3])
    pd.testing.assert_frame_equal(read_csv(report.results), frame.reset_index(drop=True))
    summary = pd.read_csv(report.summary_csv, dtype={"shots": str})
    assert len(summary) == 2 * 3 * 5 - 2
    assert len(pd.read_csv(report.gains)) == 2 * 2 * 5 - 2
    for column in ("n", "mean", "sd", "low", "high"):
        assert column in summary


@pytest.mark.usefixtures("no_drawing")
def test_what_varies_is_kept_apart_and_not_averaged(tmp_path):
    parts = [study(method=m, sources=("nih",)) for m in ("clip", "simclr")]
    frame = pd.concat([*parts, study(sources=("scratch",))], ignore_index=True)
    frame.loc[frame["method"] == "clip", "value"] += 0.2
    text = text_of(frame, tmp_path)
    assert "nih (method clip)" in text
    assert "nih (method simclr)" in text
    assert len(read_summary(tmp_path)) == 15


def read_summary(folder):
    return pd.read_csv(folder / "summary.csv", dtype={"shots": str})


@pytest.mark.usefixtures("no_drawing")
def test_budgets_other_than_shots_have_columns_of_their_own(tmp_path):
    parts = [study(shots=("full",), fraction=f) for f in (0.1, 0.5, None)]
    parts.append(rows_to_frame({**r, "shots": None, "num_images": 500} for r in study(shots=("1",)).to_dict("records")))
    report = write_report(pd.concat(parts, ignore_index=True), tmp_path, title="Study")
    assert "| metric | 500 images | 10 % | 50 % | full |" in report.summary_md.read_text()
    text = report.report.read_text()
    assert "On cifar10 with 10 % of the images, nih" in text
    assert "On cifar10 with 500 images, nih" in text


def test_the_metric_is_accuracy_or_mean_auroc_or_the_one_asked_for():
    accuracy, auroc = study(), study(targets=("xray",), metric="test/mean_auroc")
    per_class = study(class_name="cat", metric="test/auroc")
    both = pd.concat([accuracy, study(metric="test/mean_auroc"), auroc, per_class], ignore_index=True)
    chosen = select_headline(both, {})
    assert chosen.groupby("target")["metric"].unique().map(list).to_dict() == {
        "cifar10": ["accuracy"],
        "xray": ["mean_auroc"],
    }
    assert len(chosen) == len(accuracy) + len(auroc)
    assert set(select_headline(both, {"cifar10": "mean_auroc"})["metric"]) == {"mean_auroc"}
    with pytest.raises(ResultsError, match=r"xray.*kappa[\s\S]*mean_auroc"):
        select_headline(both, {"xray": "kappa"})
    loss = rows_to_frame({**r, "metric": "test/loss", "value": 2.5} for r in accuracy.to_dict("records"))
    with pytest.raises(ResultsError, match="accuracy or mean_auroc"):
        select_headline(loss, {})
    with pytest.raises(ResultsError, match=r"loss on cifar10 has values up to 2\.5"):
        select_headline(loss, {"cifar10": "loss"})


def test_no_rows_and_doubled_rows_are_errors(tmp_path):
    with pytest.raises(ResultsError, match="no result rows"):
        write_report(rows_to_frame([]), tmp_path, title="Study")
    with pytest.raises(ResultsError, match="more than once"):
        write_report(pd.concat([study(), study()], ignore_index=True), tmp_path, title="Study")


@pytest.mark.usefixtures("no_drawing")
def test_no_baseline_failures_and_versions_are_told(tmp_path):
    frame = pd.concat([study(sources=("nih",)), study(targets=("pets",), sources=("nih",), code_version="2")])
    failures = [{"cell": "pets-in1k-5", "reason": "the loss became NaN"}]
    text = text_of(frame.reset_index(drop=True), tmp_path, failures=failures)
    assert "No run could be paired with one from scratch" in text
    assert "- pets-in1k-5: the loss became NaN" in text
    assert "2 versions of the code: 1, 2" in text
    assert "Cells without a result" not in text_of(study(), tmp_path)


def test_figures_are_written_and_linked(tmp_path):
    report = write_report(
        study(targets=("cifar10", "a b|c"), shots=("1", "full")),
        tmp_path,
        title="Study",
        chance={"cifar10": 0.1},
    )
    names = [path.name for path in report.figures]
    stems = ("few_shot", "few_shot_a%20b%7Cc", "few_shot_cifar10")
    assert names == [f"{stem}.{kind}" for stem in stems for kind in ("png", "svg", "pdf")]
    for path in report.figures:
        if path.suffix == ".png":
            width, height = struct.unpack(">II", path.read_bytes()[16:24])
            assert min(width, height) > 400
        else:
            assert path.stat().st_size > 5000
    text = report.report.read_text()
    assert "(few_shot_a%2520b%257Cc.png)" in text  # the link to a name that holds a percent sign
    assert "| a b\\|c | nih |" in text


def drawn(frame, **options):
    frame = frame.assign(setting="", series=frame["source"])
    keys = ["target", "setting", "series", "source", "shots", "metric"]
    return figures.few_shot_curves(summarise(frame, keys), frame, **options)


def test_figures_are_reproducible_and_undated(tmp_path):
    first = figures.save(drawn(study(shots=("1", "full"))), tmp_path / "a")
    second = figures.save(drawn(study(shots=("1", "full"))), tmp_path / "b.1")
    assert [path.name for path in second] == ["b.1.png", "b.1.svg", "b.1.pdf"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    assert "<dc:date>" not in first[1].read_text()
    assert b"CreationDate" not in first[2].read_bytes()
    assert b"/Type3" not in first[2].read_bytes()


def test_names_at_the_line_ends_neither_overlap_nor_leave_the_figure():
    frame = study(sources=[f"a source with a long name {i}" for i in range(8)] + ["scratch"], noise=0.001)
    figure = drawn(frame, chance={"cifar10": 0.1})
    figure.draw_without_rendering()
    (axes,) = figure.axes
    boxes = sorted(
        (text.get_window_extent() for text in axes.texts if text.get_text() != "//"),
        key=lambda box: box.y0,
    )
    assert len(boxes) == 10
    assert not figure.legends
    for below, above in pairwise(boxes):
        assert below.y1 <= above.y0 + 2.5
    assert max(box.x1 for box in boxes) <= figure.bbox.x1
    assert min(box.x0 for box in boxes) >= axes.bbox.x1


def test_too_many_lines_get_a_legend_and_other_shapes_draw():
    figure = drawn(study(sources=[f"source {i:02}" for i in range(24)], shots=("1", "full")))
    assert len(figure.legends[0].get_texts()) == 24
    assert len(drawn(study(shots=("full",), seeds=1)).axes) == 1
    missing = study(targets=tuple("abcde"), sources=("nih", "scratch"), shots=("1", "full"))
    figure = drawn(missing[(missing["target"] != "b") | (missing["source"] == "nih")])
    assert len(figure.axes) == 5
    assert {axes.get_gridspec().ncols for axes in figure.axes} == {4}


def test_the_drawn_points_are_the_means_in_percent():
    frame = golden([0.35, 0.31, 0.33], [0.30, 0.32, 0.31])
    (axes,) = drawn(frame).axes
    markers = [line.get_ydata() for line in axes.lines if line.get_linestyle() == "None"]
    means = sorted(y for drawn_y in markers for y in drawn_y if len(drawn_y) == 1)
    assert means == pytest.approx([31.0, 33.0])
    seeds = sorted(y for drawn_y in markers for y in drawn_y if len(drawn_y) == 3)
    assert seeds == pytest.approx([30, 31, 31, 32, 33, 35])
    bars = sorted(float(np.ptp(p.vertices[:, 1])) for c in axes.collections for p in c.get_paths())
    assert bars == pytest.approx([2 * 2.484138, 2 * 4.968276], abs=1e-4)  # 2 t SD / sqrt(3), SD 1 and 2 points


def test_colours_are_stable_and_the_baseline_grey():
    all_sources = ["nih", "imagenet1k", "scratch", "chexpert"]
    colours = figures.source_colours(all_sources)
    assert colours == figures.source_colours(reversed(all_sources))
    assert colours["scratch"] == figures.GREY
    assert len(set(colours.values())) == 4


def test_shot_positions():
    places = figures.shot_positions(["full", "10", "1", "100", "1"])
    assert list(places) == ["1", "10", "100", "full"]
    assert [places["1"], places["10"], places["100"]] == [0, 1, 2]
    assert places["full"] > 2.3
    assert list(figures.shot_positions(["5", "0"])) == ["0", "5"]
    assert list(figures.shot_positions(["full"])) == ["full"]


def test_spread_labels_moves_as_little_as_possible():
    placed = figures.spread_labels([0.5, 0.9, 0.5], 0.1)
    assert placed.tolist() == pytest.approx([0.45, 0.9, 0.55])
    assert figures.spread_labels([0.99, 1.0], 0.1).tolist() == pytest.approx([0.9, 1.0])
    assert figures.spread_labels([0.1, 0.2, 0.3], 0.6) is None
    rng = np.random.default_rng(0)
    for _ in range(50):
        wanted = rng.random(6)
        placed = figures.spread_labels(wanted, 0.15)
        assert np.diff(np.sort(placed)).min() > 0.15 - 1e-9
        assert placed.min() >= 0
        assert placed.max() <= 1 + 1e-9
        assert (np.argsort(placed) == np.argsort(wanted)).all()
