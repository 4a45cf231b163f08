"""Pages: sections of text, facts, tables, figures and code, written as one HTML file that loads nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from penult import io
from penult.report import figures, inline, markup
from penult.report.palette import THEMES


class _Block(NamedTuple):
    kind: str
    content: dict[str, Any]


class Section:
    """A titled part of a `Page`; made by `Page.section`. Every method adds one block and returns the section.

    All text is escaped. Where a text is shown as prose (paragraphs, labels, cells, captions), it may hold
    code between backticks, ``**strong**`` and ``*emphasis*``.
    """

    def __init__(self, title: str, id: str, pictures: count[int]) -> None:
        self.title = title
        self.id = id
        self.blocks: list[_Block] = []
        self._pictures = pictures

    def _add(self, kind: str, **content: Any) -> Section:
        self.blocks.append(_Block(kind, content))
        return self

    def text(self, text: str) -> Section:
        """Add paragraphs; blank lines part them."""
        return self._add("text", paragraphs=markup.paragraphs(text))

    def facts(self, facts: Mapping[str, Any]) -> Section:
        """Add headline numbers, each large under its label.

        Args:
            facts: label to value. Strings stand as they are; numbers get thousands commas or four digits.
        """
        entries = [(label, markup.cell(value)) for label, value in facts.items()]
        lines = -(-len(entries) // 5)
        return self._add("facts", entries=entries, columns=-(-len(entries) // max(lines, 1)))

    def table(
        self,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        caption: str | None = None,
        align: str | None = None,
    ) -> Section:
        """Add a table; one too wide for the screen scrolls by itself.

        Args:
            columns: the headings.
            rows: a sequence of as many values each; values are written as in `facts`.
            caption: what the table shows.
            align: one letter a column, `l` or `r`; by default columns that hold nothing but numbers go right.

        Raises:
            ValueError: a row or `align` has another length than `columns`.
        """
        cells = [[markup.cell(value) for value in row] for row in rows]
        for row in cells:
            if len(row) != len(columns):
                raise ValueError(f"a row of {len(row)} values in a table of {len(columns)} columns: {row}")
        if align is None:
            align = "".join(_side([row[column] for row in cells]) for column in range(len(columns)))
        if len(align) != len(columns) or set(align) - set("lr"):
            raise ValueError(f"align needs one of l, r for each of {len(columns)} columns, not {align!r}")
        return self._add("table", columns=columns, rows=cells, caption=caption, align=align)

    def figure(self, figure: Figure | str, caption: str, alt: str, wide: bool | None = None) -> Section:
        """Add a figure as it is now; later changes to it don't show.

        Args:
            figure: a matplotlib figure (see `penult.report.figures`), or an SVG document as text.
            caption: stands below the figure.
            alt: what it shows, in a sentence, for those who don't see it.
            wide: on a narrow screen keep the size and scroll, rather than fit; by default for figures that
                can't be laid out anew, such as several panels or cells with numbers.

        Raises:
            ValueError: `alt` is empty, or an SVG document holds more than drawing.
        """
        drawings = [figure]
        if isinstance(figure, Figure) and not wide:
            narrow = figures.compact(figure)
            drawings += [] if narrow is None else [narrow]
            wide = wide is None and narrow is None and not figures.is_narrow(figure)
        svgs = [figures.svg(drawing, alt, prefix=f"figure{next(self._pictures)}") for drawing in drawings]
        return self._add("figure", svgs=svgs, caption=caption, alt=alt, wide=wide)

    def pictures(self, items: Sequence[Mapping[str, Any]]) -> Section:
        """Add pictures in rows, as many in each as there is room for; see `penult.report.thumbnails.gallery`.

        Args:
            items: of each its PNG in base64 (`data`), `alt`, `width` and `height` in CSS pixels, whether its pixels
                are shown as squares (`pixelated`), and `lines` that stand below it.
        """
        return self._add("pictures", items=items)

    def code(self, code: str, label: str = "Code") -> Section:
        """Add text as a terminal shows it; `label` names it to screen readers."""
        return self._add("code", code=code.strip("\n"), label=label)


class Page:
    r"""A page of sections, kept in the order in which they were added.

    The same calls give the same bytes: a page holds no date, no random id and no path.

    Args:
        title: the page's name.
        subtitle: a short line above the title.
        lead: one or two sentences that say what the reader will learn.
        footer: a line at the end, such as how to make the page again.

    Example:
        >>> page = Page("Digits", lead="What a small network's head knows.")
        >>> section = page.section("Accuracy", "Measured on *held-out* images.")
        >>> section = section.facts({"accuracy": 0.9833, "images": 1797})
        >>> section = section.table(["base", "AUROC"], [["`Sphere`", 0.981], ["`Marginal`", 0.992]])
        >>> page.html()[:21]
        '<!doctype html>\n<html'
    """

    def __init__(
        self, title: str, subtitle: str | None = None, lead: str | None = None, footer: str | None = None
    ) -> None:
        self.title = title
        self.subtitle = subtitle
        self.lead = lead
        self.footer = footer
        self.sections: list[Section] = []
        self._pictures = count(1)

    def section(self, title: str, text: str | None = None, id: str | None = None) -> Section:
        """Begin a section and return it, to be filled.

        Args:
            title: its heading.
            text: its first paragraphs.
            id: its anchor, for links to `#id`; by default made from the title.

        Raises:
            ValueError: `id` is taken, or is not lower-case words joined by hyphens.
        """
        taken = {section.id for section in self.sections} | {"content", "contents"}
        if id is None:
            name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
            id = next(each for each in _numbered(name) if each not in taken)
        elif id in taken or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", id):
            raise ValueError(f"a section's id is a name not yet taken, like this-one, not {id!r}")
        section = Section(title, id, self._pictures)
        self.sections.append(section)
        return section if text is None else section.text(text)

    def html(self) -> str:
        """Return the page as one HTML document."""
        template = _environment().get_template("page.html.jinja")
        return markup.seen(template.render(page=self, themes=THEMES, font=inline.FONT))

    def write(self, path: str | Path) -> Path:
        """Write the page to a file, whole or not at all, and return its path."""
        return io.write_bytes(path, self.html().encode())


def _side(cells: Sequence[str]) -> str:
    filled = [cell for cell in cells if cell not in ("", "–")]
    return "r" if filled and all(map(markup.is_number, filled)) else "l"


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in count(2))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("penult.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"inline": markup.inline}
    return environment
