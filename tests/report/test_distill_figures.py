import pytest
import torch

from penult.distill import ClassTrust, GateSummary
from penult.report import distill, plots
from penult.report.figures import svg


def summary(classes, labelled=True):
    trusts = tuple(
        ClassTrust(f"class {y}", 10, y / classes if labelled else None, y / (2 * classes)) for y in range(classes)
    )
    return GateSummary(10 * classes, labelled, 0.5 if labelled else None, 0.4, 0.9, 0.25, trusts)


def test_the_gate_of_each_class():
    axes = distill.gate(summary(4)).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"class {y}" for y in range(4)]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0, 0, 0.25, 0.125, 0.5, 0.25, 0.75, 0.375])
    (axes,) = distill.gate(summary(4, labelled=False)).axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0, 0.125, 0.25, 0.375])


def test_of_many_classes_those_believed_least():
    (axes,) = distill.gate(summary(1000), classes=5).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"class {y}" for y in range(5)]


def test_confusion_in_shares_of_each_row():
    (axes,) = distill.confusion(torch.tensor([[9, 1, 0], [2, 6, 0], [0, 0, 0]]), ["a", "b", "c"]).axes
    assert [text.get_text() for text in axes.texts] == ["90%", "10%", "0%", "25%", "75%", "0%", "0%", "0%", "0%"]
    assert axes.get_xlabel() == "prediction of the student"
    axes = distill.confusion(torch.eye(100), [str(y) for y in range(100)]).axes[0]
    assert not axes.texts
    with pytest.raises(ValueError, match=r"2 names don't fit a confusion matrix \(3, 3\)"):
        distill.confusion(torch.eye(3), ["a", "b"])


def test_accuracy_over_epochs():
    history = [
        {"epoch": 1, "train_loss": 2.0, "val_accuracy": 0.5},
        {"epoch": 2, "train_loss": 1.0, "val_accuracy": 0.8},
    ]
    figure = distill.accuracy(history, start=0.1, teacher=0.9)
    student, teacher = figure.axes[0].get_lines()
    assert student.get_xydata().tolist() == [[0, 0.1], [1, 0.5], [2, 0.8]]
    assert set(teacher.get_ydata()) == {0.9}
    assert "teacher" in svg(figure, alt="curves")
    figure = distill.accuracy([{"epoch": 1, "train_loss": 2.0}])
    assert figure.axes[0].get_ylabel() == "loss"
    with pytest.raises(ValueError, match="no epoch"):
        distill.accuracy([])


def test_names_that_no_font_takes_are_shown_as_what_they_are():
    """Of folders that are no UTF-8, or written to trick a reader."""
    name, images = "a\ud800\u202eb", torch.rand(2, 4, 4)
    for figure in (
        plots.heatmap(torch.eye(2), [name, "c"], ["c", name]),
        plots.histograms({name: torch.rand(50), "c": torch.rand(50)}),
        plots.bars({name: 0.5, "c": 0.4}),
        plots.curves([0.0, 1.0], {name: [0.0, 1.0]}, "x", "y"),
        plots.image_grid(images, columns=2, captions=[name, name]),
        plots.image_grid(images, columns=1, row_labels=[name, name]),
    ):
        picture = svg(figure, alt="names")
        assert not set("\ud800\u202e") & set(picture)
        assert "a\ufffd\ufffdb" in picture


def test_names_are_no_formulas():
    names = ["$x", "$a_b$", r"\$"]
    drawn = svg(distill.confusion(torch.eye(3), names), alt="$")
    assert all(name in drawn for name in names)
