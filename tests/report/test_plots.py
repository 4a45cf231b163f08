import numpy as np
import pytest
import torch

from penult.report import figures, plots


def texts(figure):
    svg = figures.svg(figure, alt="a")
    return [part.split("<")[0] for part in svg.split(">") if part and not part.startswith("<")]


def legend_names(figure):
    return [text.get_text() for box in figure.legends for text in box.get_texts()]


@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor])
def test_arrays_and_tensors_draw_alike(kind):
    x, y = [0.0, 1.0, 2.0], [0.5, 0.25, 1.0]
    plain = figures.svg(plots.curves(x, {"a": y}, "x", "y", bands={"a": (y, y)}), alt="a")
    drawn = plots.curves(kind(x), {"a": kind(y)}, "x", "y", bands={"a": (kind(y), kind(y))})
    assert figures.svg(drawn, alt="a") == plain


def test_tensors_come_off_their_graph_in_any_precision():
    y = torch.tensor([0.5, 0.25], dtype=torch.bfloat16, requires_grad=True)
    line = plots.curves([0, 1], {"a": y}, "x", "y").axes[0].lines[0]
    assert line.get_ydata().tolist() == [0.5, 0.25]


def test_histograms_are_densities_over_common_bins():
    rng = np.random.default_rng(0)
    figure = plots.histograms(
        {"a": rng.random(500), "b": rng.random(100) + 0.5},
        {"a": ([0, 1], [1, 1]), "theory": ([0, 1], [0, 2])},
        "u",
        bins=15,
    )
    steps = [patch.get_data() for patch in figure.axes[0].patches[::2]]
    assert len(steps) == 2
    for step in steps:
        assert len(step.values) == 15
        assert (step.values * np.diff(step.edges)).sum() == pytest.approx(1)
    assert np.array_equal(steps[0].edges, steps[1].edges)
    assert legend_names(figure) == ["a", "b", "exact density", "theory"]


def test_legends_stand_above_the_axes():
    figure = plots.curves([0, 1], {f"curve number {k}": [k, k] for k in range(12)}, "x", "y")
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert box.y0 >= figure.axes[0].get_window_extent().y1
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


def test_curves_beyond_the_fifth_are_dashed():
    lines = plots.curves([0, 1], {str(k): [k, k] for k in range(6)}, "x", "y").axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["-"] * 5 + ["--"]


def test_heatmap_numbers_and_missing_cells():
    figure = plots.heatmap([[0.123, np.nan], [-1.0, 1.0]], ["a", "b"], ["c", "d"], diverging=True, ylabel="true")
    shown = texts(figure)
    assert {"0.12", "−1.00", "1.00", "a", "b", "c", "d", "true"} <= set(shown)
    assert "nan" not in shown
    assert texts(plots.heatmap([[2.0]], ["a"], ["b"])).count("2.00") == 1


def test_heatmap_labels_must_fit():
    with pytest.raises(ValueError, match=r"2 row labels and 1 column labels don't fit a matrix \(2, 2\)"):
        plots.heatmap(np.eye(2), ["a", "b"], ["a"])


def test_scatter_pairs_share_square_axes():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(50, 2)), rng.normal(size=(30, 2)) * 4
    figure = plots.scatter(
        torch.tensor(real), rng.integers(0, 3, 50), ["a", "b", "c"], second=(fake, rng.integers(0, 3, 30))
    )
    left, right = figure.axes
    assert left.get_xlim() == right.get_xlim()
    assert left.get_ylim() == right.get_ylim()
    assert np.ptp(left.get_xlim()) == pytest.approx(np.ptp(left.get_ylim()))
    assert left.get_xlim()[0] < fake[:, 0].min()
    assert fake[:, 1].max() < left.get_ylim()[1]
    assert [left.get_title(loc="left"), right.get_title(loc="left")] == ["real", "synthetic"]
    assert legend_names(figure) == ["a", "b", "c"]
    assert len(plots.scatter(real, np.zeros(50), ["a"]).axes) == 1


def test_bars_bear_their_numbers():
    figure = plots.bars({"a": 0.5, "b": -0.25}, errors={"a": 0.1}, xlabel="score")
    assert {"0.5", "−0.25", "a", "b", "score"} <= set(texts(figure))
    assert not figure.legends
    grouped = plots.bars({"a": {"x": 1.0, "y": 2.0}, "b": {"y": 3.0}}, errors={"a": {"x": 0.1}})
    assert legend_names(grouped) == ["x", "y"]
    assert [patch.get_width() for patch in grouped.axes[0].patches] == [1.0, 2.0, 3.0]
    plots.bars({"a": 0.0})


@pytest.mark.parametrize("shape", [(5, 4, 4), (5, 4, 6, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_image_grids_embed_each_image(shape, dtype):
    images = (torch.rand(shape) * (255 if dtype is torch.uint8 else 1)).to(dtype)
    figure = plots.image_grid(images, columns=3, captions=list("abcde"), row_labels=["top", "bottom"])
    svg = figures.svg(figure, alt="a")
    assert svg.count("<image ") == 5
    assert set(texts(figure)) >= {*"abcde", "top", "bottom"}


@pytest.mark.parametrize("shape", [(4, 4), (0, 4, 4), (5, 4, 4, 2), (1, 1, 1, 1, 1)])
def test_image_grids_refuse_other_shapes(shape):
    with pytest.raises(ValueError, match="image_grid needs images"):
        plots.image_grid(np.zeros(shape), columns=2)
