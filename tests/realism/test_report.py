"""Figures of a comparison."""

import dataclasses

import pytest
import torch

from penult import Activations, GenerativePair, Sphere
from penult.realism import CANDIDATES, choose, compare
from penult.report import Page, figures, realism


@pytest.fixture
def result(truth, real, quick):
    return compare(GenerativePair(truth.head, Sphere.fit(truth.head, real.activations)), real[:600])


def texts(figure):
    return figures.svg(figure, alt="a")


def test_auc_bars_bear_both_columns(result):
    svg = texts(realism.aucs(result))
    for word in (*result.auc, "pair against real", "real against real", f"{result.auc['logistic']:.3f}"):
        assert word in svg


def test_histograms_are_densities_with_the_exact_mean(result):
    figure = realism.cosines(result)
    (axes,) = figure.axes
    for patch in axes.patches[::2]:
        steps = patch.get_data()
        assert float((steps.values * (steps.edges[1:] - steps.edges[:-1])).sum()) == pytest.approx(1)
    assert axes.lines[0].get_xdata()[0] == pytest.approx(result.chart_cosine.law_mean)
    assert "coordinates of the sphere" in texts(figure)
    assert "norm of h" in texts(realism.norms(result))
    without = dataclasses.replace(result, norm=dataclasses.replace(result.norm, histogram=None))
    with pytest.raises(ValueError, match="no histogram"):
        realism.norms(without)


def test_a_ranking_is_drawn_with_its_names(truth, real, quick):
    def broken(head, rows):
        raise ValueError("no")

    few = {name: CANDIDATES[name] for name in ("sphere", "gaussian", "elliptic")} | {"broken": broken}
    found = choose(truth.head, real[:900], candidates=few)
    figure = realism.ranking(found)
    assert "mathdefault" not in figures.svg(figure, alt="ranking")  # which is how matplotlib says 10³ in a formula
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == [row.name for row in found.rows if row.error is None]
    assert axes.get_xscale() == "log"
    best = found[found.best]
    assert (best.floats, 0.5 + best.distance) in [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines[1:]]
    columns, rows = realism.ranking_table(found)
    assert [row[0] for row in rows] == [*(row.name for row in found.rows if row.error is None), "real against real"]
    assert all(len(row) == len(columns) for row in rows)
    page = Page("Realism")
    page.section("Bases").figure(figure, caption="Cost and realism.", alt="Points.")
    assert "gaussian" in page.html()


def test_names_of_pre_activation_results_draw_too(truth, quick):
    u = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    acts = Activations(u, truth.head(u.relu()), pre_activation=True)
    assert texts(realism.cosines(compare(truth, acts)))
