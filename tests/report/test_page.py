import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

from penult.report import Page, figures, plots

HOSTILE = '<script>alert("&")</script>'


class Reader(HTMLParser):
    """Collects what a test asks of a page: tags, attributes and ids."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, key, value or "") for key, value in attrs]

    def values(self, name):
        return [value for _, key, value in self.attributes if key == name]


def small_figure():
    return plots.curves([0, 1], {"a": [0, 1]}, "x", "y")


def test_every_text_is_escaped():
    page = Page(HOSTILE, subtitle=HOSTILE, lead=HOSTILE, footer=HOSTILE)
    section = page.section(HOSTILE, f"{HOSTILE}\n\n`{HOSTILE}` **{HOSTILE}** *{HOSTILE}*")
    page.section("another, so that there are contents")
    section.facts({HOSTILE: HOSTILE})
    section.table([HOSTILE], [[HOSTILE]], caption=HOSTILE)
    section.figure(small_figure(), caption=HOSTILE, alt=f'"{HOSTILE}')
    section.figure(plots.bars({HOSTILE: 1.0}), caption="", alt=HOSTILE, wide=True)
    section.code(HOSTILE, label=f'"{HOSTILE}')
    reader = Reader(page.html())
    assert "script" not in reader.tags
    assert not [key for _, key, _ in reader.attributes if key.startswith("on")]
    assert reader.values("aria-label").count(f'"{HOSTILE}') == 3


def test_inline_markup():
    page = Page("t")
    page.section("s", "`a < b`, **bold**, *soft*; 2 * 3 * 4, 2**3**4\n\nsecond")
    assert "<p><code>a &lt; b</code>, <strong>bold</strong>, <em>soft</em>; 2 * 3 * 4, 2**3**4</p>" in page.html()
    assert "<p>second</p>" in page.html()


@pytest.mark.slow
def test_the_same_calls_give_the_same_bytes(sample, build_sample):
    assert sample.html() == sample.html() == build_sample().html()


def test_the_page_loads_nothing(sample):
    html = sample.html()
    reader = Reader(html)
    assert not {"script", "iframe", "object", "embed", "img", "base", "form"} & set(reader.tags)
    assert not re.findall(r"https?:|url\((?!#)|@import|@font-face", html)
    for value in reader.values("src") + reader.values("href") + reader.values("xlink:href"):
        assert value.startswith(("#", "data:"))


def test_ids_are_unique_and_links_lead_to_them(sample):
    reader = Reader(sample.html())
    ids = reader.values("id")
    assert len(ids) == len(set(ids))
    targets = {value[1:] for value in reader.values("href") if value.startswith("#")}
    targets |= set(re.findall(r"url\(#([^)]+)\)", sample.html())) | set(reader.values("aria-labelledby"))
    assert targets <= set(ids)


def test_section_ids():
    page = Page("t")
    assert [page.section(title).id for title in ("Über uns!", "Content", "Same", "Same", "日本")] == [
        "ber-uns",
        "content-2",
        "same",
        "same-2",
        "section",
    ]
    assert page.section("Own", id="own-name").id == "own-name"
    for bad in ("own-name", "Has Space", "content", "", 'x"y'):
        with pytest.raises(ValueError, match="id"):
            page.section("x", id=bad)


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_a_figure_needs_an_alt(alt):
    with pytest.raises(ValueError, match="alt"):
        Page("t").section("s").figure(small_figure(), caption="c", alt=alt)


def test_table_alignment_and_values():
    page = Page("t")
    page.section("s").table(
        ["name", "score", "kind"],
        [["a", torch.tensor(0.9877), "1 of 2"], ["b", None, "none"], ["**c**", "**.9** ± .1", "–"]],
    )
    html = page.html()
    assert re.findall(r'<th scope="col" class="(.)">', html) == ["l", "r", "l"]
    assert '<td class="r">0.9877</td>' in html
    assert '<td class="r">–</td>' in html
    assert '<td class="r"><strong>.9</strong> ± .1</td>' in html
    assert '<th scope="row" class="l"><strong>c</strong></th>' in html


def test_tables_refuse_ragged_rows_and_unknown_alignments():
    section = Page("t").section("s")
    with pytest.raises(ValueError, match="2 columns"):
        section.table(["a", "b"], [[1]])
    for align in ("l", "lc"):
        with pytest.raises(ValueError, match="align"):
            section.table(["a", "b"], [[1, 2]], align=align)
    assert section.table([], []) is section
    assert section.facts({}) is section


def test_scrolling_parts_can_be_reached_by_keyboard(sample):
    scrolling = re.findall(r'<(?:div|pre) class="scroll[^>]*>', sample.html())
    assert len(scrolling) >= 4
    assert all('tabindex="0"' in tag and 'role="region"' in tag and "aria-label=" in tag for tag in scrolling)


def test_landmarks_and_head(sample):
    html = sample.html()
    reader = Reader(html)
    assert html.startswith('<!doctype html>\n<html lang="en">')
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    for tag in ("header", "nav", "main", "footer", "h1", "title"):
        assert reader.tags.count(tag) == 1
    assert '<a class="skip" href="#content">' in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_write_is_atomic(tmp_path, monkeypatch):
    page = Page("t")
    path = page.write(tmp_path / "new" / "page.html")
    assert path == tmp_path / "new" / "page.html"
    assert path.read_text(encoding="utf-8") == page.html()
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left")

    page.section("more")
    for call in ("os.replace", "pathlib.Path.write_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(call, full)
            with pytest.raises(OSError, match="no space"):
                page.write(path)
        assert [each.name for each in path.parent.iterdir()] == ["page.html"]
        assert path.read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_a_missing_extra_says_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None\nimport penult\ntry: import penult.report\n"
    code += "except ImportError as error: print(error, error.name)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert 'pip install "penult[report]"' in shown
    assert missing in shown


def test_figures_come_in_a_roomy_and_a_narrow_layout_or_scroll():
    def classes(figure, **options):
        page = Page("t")
        page.section("s").figure(figure, "c", "a", **options)
        return re.findall(r'<div class="(roomy|narrow|scroll wide)"', page.html())

    panels = figures.new_figure(1, 2)[0]
    assert classes(small_figure()) == ["roomy", "narrow"]
    assert classes(small_figure(), wide=True) == ["scroll wide"]
    assert classes(panels) == ["scroll wide"]
    assert classes(panels, wide=False) == []
    assert classes(plots.heatmap([[1.0]], ["a"], ["b"])) == []
    assert classes(figures.svg(small_figure(), alt="a")) == []
