import re
import sys
from xml.etree import ElementTree

import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest
from matplotlib.figure import Figure

from penult.report import figures, plots
from penult.report.palette import DARK, LEVELS, LIGHT, SERIES, STRONG, THEMES

# Machado, Oliveira & Fernandes (2009), severity 1: red-blind, green-blind, blue-blind
VISIONS = {
    "all": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_CONES = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566]]
TO_CONES += [[0.0883024619, 0.2817188376, 0.6299787005]]
TO_LAB = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099]]
TO_LAB += [[0.0259040371, 0.7827717662, -0.8086757660]]


def linear(colour):
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(one, other):
    low, high = sorted(linear(colour) @ [0.2126, 0.7152, 0.0722] for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def line_figure(name="a"):
    return plots.curves([0, 1, 2], {name: [0, 1, 4]}, "x", "y")


@pytest.mark.parametrize("theme", THEMES)
def test_text_and_series_stand_out(theme):
    colours = THEMES[theme]
    for text in ("ink", "muted", "accent"):
        for ground in ("paper", "surface"):
            assert contrast(colours[text], colours[ground]) >= 4.5
    assert all(contrast(colours[f"series-{k}"], colours["paper"]) >= 3 for k in range(1, 11))
    for ramp, strong in STRONG.items():
        for level in range(LEVELS):
            ink = colours["on-high" if level in strong else "on-low"]
            assert contrast(ink, colours[f"{ramp}-{level}"]) >= 4.5, (ramp, level)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("vision", VISIONS)
def test_series_stay_apart(theme, vision):
    seen = np.stack([np.array(VISIONS[vision]) @ linear(THEMES[theme][f"series-{k}"]) for k in range(1, 11)])
    lab = np.cbrt(np.clip(seen, 0, 1) @ np.array(TO_CONES).T) @ np.array(TO_LAB).T
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)[np.triu_indices(10, 1)]
    assert distances.min() > (0.12 if vision == "all" else 0.065)


def test_palette_names_are_one_to_one():
    assert len(set(LIGHT.values())) == len(LIGHT)
    assert LIGHT.keys() == DARK.keys()
    assert len(SERIES) == 10


def test_svg_follows_the_theme():
    svg = figures.svg(line_figure(), alt="a line")
    assert f"stroke:var(--series-1,{LIGHT['series-1']})" in svg
    assert f"var(--muted,{LIGHT['muted']})" in svg
    assert f"var(--line,{LIGHT['line']})" in svg
    assert not set(re.findall(r"#[0-9a-f]{6}", re.sub(r"var\([^)]*\)", "", svg)))
    assert "DejaVu" not in svg


def test_default_black_and_white_follow_too():
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], color="black")
    axes.text(0, 0, "black by default")
    svg = figures.svg(figure, alt="x")
    assert "#000000" not in svg
    assert re.search(r'^<svg [^>]*style="[^"]*fill:var\(--ink,', svg)


def test_svg_is_a_small_scaling_picture_with_an_alt():
    svg = figures.svg(line_figure(), alt='a "line" < curve')
    root = ElementTree.fromstring(svg)
    assert root.attrib["viewBox"] == "0 0 600 360"
    assert not {"width", "height"} & set(root.keys())
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-label"] == 'a "line" < curve'
    assert len(svg) < 20_000
    assert "accuracy" not in svg
    assert ">x</text>" in svg


def test_svg_is_deterministic_and_prefixes_ids():
    one, again = (figures.svg(line_figure(), alt="a") for _ in range(2))
    assert one == again
    other = figures.svg(line_figure(), alt="a", prefix="other")
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg, mine in zip((one, other), ids, strict=True):
        assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)) <= {
            pair for each in mine for pair in ((each, ""), ("", each))
        }


def test_labels_keep_their_digits_and_markup():
    svg = figures.svg(plots.bars({"<b> & 0.123456": 0.123456}, number=".6f"), alt="a")
    assert "&lt;b&gt; &amp; 0.123456</text>" in svg
    assert svg.count("0.123456") == 2


def test_an_svg_document_is_taken_as_text():
    inside = '<path id="p" fill="#1a212c" d="M0 0"/>'
    source = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 10 10">{inside}</svg>'
    svg = figures.svg(source, alt="a dot")
    assert "http" not in svg
    assert '<path fill="var(--ink,#1a212c)" d="M0 0"' in svg
    assert figures.svg(svg, alt="a dot") == svg


@pytest.mark.parametrize(
    "inside",
    [
        "<script>1</script>",
        "<foreignObject/>",
        '<path onclick="1"/>',
        '<use href="http://a.b/c"/>',
        '<use href="data:image/svg+xml,x"/>',
        '<image href="//a.b/c.png"/>',
        '<path style="fill:url(http://a.b)"/>',
        '<a href="javascript:1"/>',
        '<animate attributeName="x"/>',
    ],
)
def test_an_svg_document_holds_nothing_but_drawing(inside):
    source = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1">{inside}</svg>'
    with pytest.raises(ValueError, match="an SVG on a page"):
        figures.svg(source, alt="a")


def test_fonts_of_older_matplotlib_are_read():
    source = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9"><text style="font: bold 13.5px '
        "'DejaVu Sans', sans-serif; text-anchor: middle\">a</text></svg>"
    )
    assert 'style="font-size:13.5px;font-weight:bold;text-anchor:middle"' in figures.svg(source, alt="a")


def test_the_house_style_touches_no_global():
    before = dict(matplotlib.rcParams)
    figure = plots.heatmap(np.eye(3), "abc", "abc")
    figures.svg(figure, alt="a")
    with figures.style():
        assert matplotlib.rcParams["svg.fonttype"] == "none"
    assert dict(matplotlib.rcParams) == before


def test_the_users_own_style_does_not_show():
    plain = figures.svg(line_figure(), alt="a")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9, "axes.grid": False}):
        assert figures.svg(line_figure(), alt="a") == plain


@pytest.mark.slow
def test_importing_the_room_leaves_pyplot_alone():
    import subprocess

    code = "import sys, penult.report; print('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_compact_lays_out_anew_and_leaves_the_figure():
    names = {f"a long name {k}": [k, 1] for k in range(5)}
    figure = plots.curves([0, 1], names, "x", "y")
    before = figures.svg(figure, alt="a")
    narrow = figures.compact(figure)
    assert narrow.get_figwidth() * 72 == pytest.approx(400)
    assert [text.get_text() for text in narrow.legends[0].get_texts()] == list(names)
    assert figures.svg(figure, alt="a") == before
    assert figures.compact(narrow) is None
    assert figures.compact(plots.image_grid(np.zeros((20, 4, 4)), columns=20)) is None
    assert figures.compact(plots.heatmap(np.eye(9), "abcdefghi", "abcdefghi")) is None
    assert figures.compact(figures.new_figure(1, 2)[0]) is None


def test_compact_opens_no_second_window():
    figure = matplotlib.pyplot.figure(figsize=(9, 4), layout="constrained")
    figure.subplots().plot([0, 1])
    manager = figure.canvas.manager
    try:
        assert figures.compact(figure) is not None
        assert matplotlib.pyplot.get_fignums() == [figure.number]
        assert figure.canvas.manager is manager
    finally:
        matplotlib.pyplot.close(figure)


@pytest.mark.parametrize("theme", THEMES)
def test_saved_pictures_wear_a_theme(theme, tmp_path):
    figure = plots.heatmap(np.array([[0.0, 1.0], [0.5, 0.2]]), "ab", "cd")
    figure.axes[0].plot([0, 2], [0, 2], color=SERIES[1])
    before = figures.svg(figure, alt="a")
    png = figures.save(figure, tmp_path / "figure.png", theme=theme, scale=1)
    svg = figures.save(figure, tmp_path / "figure.svg", theme=theme).read_text()
    assert figures.svg(figure, alt="a") == before
    pixels = (matplotlib.image.imread(png)[..., :3] * 255).round().astype(int)
    width, height = figure.get_size_inches() * 72
    assert pixels.shape[:2] == (int(height), int(width))
    seen = {"#{:02x}{:02x}{:02x}".format(*pixel) for pixel in pixels.reshape(-1, 3)}
    for name in ("paper", "sequential-0", "sequential-20", "series-2"):
        assert THEMES[theme][name] in svg
        assert THEMES[theme][name] in seen
    assert "var(" not in svg
    assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"


def test_saved_fields_keep_to_their_ramp(tmp_path):
    figure = plots.heatmap(np.linspace(0, 1, 900).reshape(30, 30), [""] * 30, [""] * 30, annotate=False)
    png = figures.save(figure, tmp_path / "field.png", theme="dark", scale=1)
    pixels = (matplotlib.image.imread(png)[40:380, 40:380, :3] * 255).round().astype(int).reshape(-1, 3)
    ramp = np.array([[int(DARK[f"sequential-{k}"][i : i + 2], 16) for i in (1, 3, 5)] for k in range(LEVELS)])
    assert np.abs(pixels[:, None] - ramp[None]).sum(-1).min(1).max() < 40


def test_save_knows_two_endings(tmp_path):
    for name in ("a.gif", "a"):
        with pytest.raises(ValueError, match=r"\.png or \.svg"):
            figures.save(line_figure(), tmp_path / name)
