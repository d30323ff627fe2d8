"""Heat maps and scaling curves: what is drawn is what the table says."""

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import Rectangle
from matplotlib.text import Annotation

from datamodules.errors import DataError
from studies import figures
from studies.heat_map import DIVERGING, SEQUENTIAL, heat_map
from studies.scaling_figures import FittedCurve, scaling_curves, short_number


@pytest.fixture
def gains():
    rows = [
        ("nih", "cifar10", 0.002, "n.d."),
        ("nih", "tb", 0.125, "[9.0, 16.0]"),
        ("in1k $x$", "cifar10", -0.05, None),
        ("in1k $x$", "tb", np.nan, ""),
        ("a source with a very long name indeed", "cifar10", 0.01, ""),
    ]
    return pd.DataFrame(rows, columns=["source", "target", "gain", "note"])


def texts(axes):
    return {
        (int(text.get_position()[1]), int(text.get_position()[0]), text.get_text()) for text in axes.texts
    }  # (row, column, text)


def test_every_cell_has_its_number_and_note(gains):
    axes = heat_map(gains, "gain", "gain (points)", diverging=True).axes[0]
    assert texts(axes) == {
        (0, 0, "+0.2"),
        (0, 0, "n.d."),
        (0, 1, "+12.5"),
        (0, 1, "[9.0, 16.0]"),
        (1, 0, "−5.0"),
        (2, 0, "+1.0"),
    }
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cifar10", "tb"]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "nih",
        "in1k $x$",
        "a source with a very\nlong name indeed",
    ]
    assert axes.yaxis_inverted()


def test_missing_cells_are_hatched_and_only_they(gains):
    axes = heat_map(gains, "gain", "gain (points)", diverging=True).axes[0]
    hatched = {(p.get_y(), p.get_x()) for p in axes.patches if isinstance(p, Rectangle) and p.get_hatch()}
    assert hatched == {(1, 1), (2, 1)}  # NaN, and no row at all


def test_colours_of_differences_part_at_zero(gains):
    (mesh,) = heat_map(gains, "gain", "gain (points)", diverging=True).axes[0].collections
    assert mesh.get_clim() == pytest.approx((-12.5, 12.5))
    assert mesh.get_cmap().name == DIVERGING
    accuracy = gains.assign(accuracy=[0.5, 0.9, 0.7, np.nan, 0.6])
    (mesh,) = heat_map(accuracy.drop(columns="note"), "accuracy", "accuracy (%)").axes[0].collections
    assert mesh.get_clim() == pytest.approx((50, 90))
    assert mesh.get_cmap().name == SEQUENTIAL


@pytest.mark.parametrize("name", [SEQUENTIAL, DIVERGING])
def test_numbers_are_readable_on_their_cells(name):
    cells = pd.DataFrame({"source": [f"s{i}" for i in range(21)], "target": "t", "v": np.linspace(-1, 1, 21)})
    axes = heat_map(cells, "v", "v", diverging=name == DIVERGING).axes[0]

    def luminance(colour):
        c = np.asarray(matplotlib.colors.to_rgb(colour))
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]

    cmap = matplotlib.colormaps[name]
    for text in axes.texts:
        ground = cmap((int(text.get_position()[1])) / 20)[:3]
        dark, light = sorted([luminance(ground), luminance(text.get_color())])
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_equal_and_absent_values_draw(gains):
    same = gains.assign(gain=0.5)
    assert np.diff(heat_map(same, "gain", "g").axes[0].collections[0].get_clim())[0] > 0
    none = heat_map(gains.assign(gain=np.nan), "gain", "g", diverging=True)
    assert not none.axes[0].texts


def test_maps_share_a_scale_where_it_is_given(gains):
    (mesh,) = heat_map(gains, "gain", "gain", diverging=True, limit=0.2).axes[0].collections
    assert mesh.get_clim() == pytest.approx((-20, 20))


@pytest.mark.parametrize("rows", [1, 5])
def test_nothing_leaves_the_figure(gains, tmp_path, rows):
    figure = heat_map(gains.head(rows), "gain", "gain over scratch (points)", diverging=True)
    figure.draw_without_rendering()
    box = figure.get_tightbbox()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= figure.get_figwidth() + 0.01
    assert box.y1 <= figure.get_figheight() + 0.01
    assert [path.suffix for path in figures.save(figure, tmp_path / "map")] == [".png", ".svg", ".pdf"]
    assert (tmp_path / "map.pdf").read_bytes().startswith(b"%PDF")


def test_two_values_of_one_cell_are_an_error(gains):
    with pytest.raises(DataError, match="nih → tb"):
        heat_map(pd.concat([gains, gains.iloc[[1]]]), "gain", "g")


# SCALING -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def sizes():
    rows = [
        (panel, series, x, 0.5 + 0.1 * i + shift, 0.48 + 0.1 * i + shift, 0.52 + 0.1 * i + shift)
        for panel in ("cifar10", "tb")
        for series, shift in (("50x1", 0.0), ("152x4", 0.05))
        for i, x in enumerate([13_000, 112_120, 1_281_167])
    ]
    return pd.DataFrame(rows, columns=["panel", "series", "x", "mean", "low", "high"])


def test_points_intervals_and_ticks(sizes):
    axes = scaling_curves(sizes, "images of the source", "accuracy (%)").axes
    assert len(axes) == 2
    assert axes[0].get_xscale() == "log"
    first, second = axes[0].lines
    assert first.get_xdata().tolist() == [13_000, 112_120, 1_281_167]
    assert first.get_ydata().tolist() == pytest.approx([50, 60, 70])
    assert second.get_ydata().tolist() == pytest.approx([55, 65, 75])
    bars = [path.vertices[:, 1].tolist() for path in axes[0].collections[0].get_paths()]
    assert bars == [pytest.approx(pair) for pair in ([48, 52], [58, 62], [68, 72])]
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["13k", "112k", "1.28M"]


def test_lines_are_named_at_their_ends_in_a_single_panel(sizes):
    figure = scaling_curves(sizes[sizes["panel"] == "tb"], "images seen", "accuracy (%)")
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {"50x1", "152x4"}
    assert not figure.legends
    assert all(text.get_window_extent().x0 >= axes.bbox.x1 for text in axes.texts)
    assert max(text.get_window_extent().x1 for text in axes.texts) <= figure.bbox.x1


def test_fitted_curves_are_drawn_and_told(sizes):
    x = np.geomspace(13_000, 1_281_167, 20)
    fit = FittedCurve("tb", "50x1", x, 0.5 + 0.1 * np.log10(x / 13_000), "exponent 0.21 [0.10, 0.33]")
    cifar, tb = scaling_curves(sizes, "parameters", "accuracy (%)", fits=[fit]).axes
    assert not [text for text in cifar.texts if isinstance(text, Annotation)]
    (said,) = [text for text in tb.texts if isinstance(text, Annotation)]
    assert said.get_text() == "50x1: exponent 0.21 [0.10, 0.33]"
    curve = next(line for line in tb.lines if len(line.get_xdata()) == 20)
    assert curve.get_ydata().tolist() == pytest.approx((100 * fit.y).tolist())
    assert curve.get_color() == said.get_color()
    points = next(line for line in tb.lines if line.get_color() == curve.get_color() and line is not curve)
    assert points.get_linestyle() == "None"  # the curve, and no second line, joins the points


def test_points_without_a_value_draw_nothing(sizes):
    figure = scaling_curves(sizes[sizes["panel"] == "tb"].assign(mean=float("nan")), "images seen", "accuracy (%)")
    assert not figure.axes[0].lines


def test_no_place_on_a_log_axis(sizes):
    with pytest.raises(DataError, match="images seen 0"):
        scaling_curves(pd.concat([sizes, sizes.iloc[[0]].assign(x=0)]), "images seen", "accuracy (%)")


@pytest.mark.parametrize(
    ("value", "text"),
    [(1_281_167, "1.28M"), (999_999, "1M"), (500, "500"), (23_508_032, "23.5M"), (3e9, "3G"), (0.5, "0.5")],
)
def test_short_numbers(value, text):
    assert short_number(value) == text
