import pytest
import torch

from penult.report import generate
from penult.report.figures import svg


@pytest.mark.parametrize(("rows", "channels", "height", "width"), [(2, 1, 8, 8), (3, 3, 8, 12), (200, 1, 4, 4)])
def test_rows_of_images(rows, channels, height, width):
    images = torch.rand(rows, 3, channels, height, width)
    figure = generate.image_rows(images, [f"class {y}" for y in range(rows)])
    (axes,) = figure.axes
    drawn = axes.get_images()
    assert len(drawn) == 3 * rows
    pixels = torch.as_tensor(drawn[4].get_array())
    assert torch.equal(pixels, images[1, 1].expand(3, -1, -1).permute(1, 2, 0))
    assert [text.get_text() for text in axes.texts] == [f"class {y}" for y in range(rows)]
    if rows < 100:
        assert svg(figure, alt="images").count("<image") == 3 * rows


def test_names_are_no_mathematics_and_are_cut():
    figure = generate.image_rows(torch.rand(2, 1, 1, 2, 2), ["$5 $6 \\frac", "a" * 30])
    document = svg(figure, alt="images")
    assert "$5 $6 \\frac" in document
    assert "a" * 23 + "…" in document
    assert "a" * 24 not in document


@pytest.mark.parametrize(
    ("shape", "names", "words"),
    [((2, 3, 8, 8), 2, "not"), ((2, 3, 2, 8, 8), 2, "needs images of shape"), ((2, 3, 1, 8, 8), 3, "3 names")],
)
def test_images_and_names_have_to_fit(shape, names, words):
    with pytest.raises(ValueError, match=words):
        generate.image_rows(torch.rand(shape), ["name"] * names)


def test_losses():
    history = [{"epoch": 1, "loss": 3.0, "cosine": 0.5}, {"epoch": 2, "loss": 2.0, "val_loss": 2.5, "cosine": 0.6}]
    (axes,) = generate.losses(history).axes
    training, held = axes.get_lines()
    assert training.get_ydata().tolist() == [3, 2]
    assert held.get_ydata()[1] == 2.5
    assert held.get_ydata()[0] != held.get_ydata()[0]
    assert "held-out images" in svg(generate.losses(history), alt="curves")
    with pytest.raises(ValueError, match="no epoch"):
        generate.losses([])


def test_losses_of_adversaries_and_cosines():
    history = [{"epoch": 1, "discriminator_loss": 1.3, "loss": 2.0, "cosine": 0.1, "val_cosine": 0.2}]
    history.append({"epoch": 2, "discriminator_loss": 1.2, "loss": 1.0, "cosine": 0.5, "val_cosine": 0.6})
    (axes,) = generate.losses(history).axes
    assert [line.get_ydata().tolist() for line in axes.get_lines()] == [[2, 1], [1.3, 1.2]]
    drawn = svg(generate.losses(history), alt="curves")
    assert drawn.index(">generator<") < drawn.index(">discriminator<")
    assert ">training<" not in drawn
    (axes,) = generate.cosines(history).axes
    assert [line.get_ydata().tolist() for line in axes.get_lines()] == [[0.1, 0.5], [0.2, 0.6]]
    assert axes.get_ylabel() == "cosine"
    with pytest.raises(ValueError, match="no epoch with a cosine"):
        generate.cosines([{"epoch": 1, "loss": 2.0}])
