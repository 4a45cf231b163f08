"""Pages of text, headline numbers, tables, figures and code, written as one self-contained HTML file."""

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
    """A titled part of a `Page`, made by `Page.section`. Each method adds one block and returns the section.

    All text is escaped. Prose (paragraphs, labels, table cells, captions) may contain code between backticks,
    ``**strong**`` and ``*emphasis*``.
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
        """Add paragraphs, separated by blank lines."""
        return self._add("text", paragraphs=markup.paragraphs(text))

    def facts(self, facts: Mapping[str, Any]) -> Section:
        """Add headline numbers, each in large type under its label.

        Args:
            facts: Values by label. Strings are shown as they are, integers with thousands separators, other numbers
                with four significant digits.
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
        """Add a table. A table that is wider than the screen gets its own scroll bar.

        Args:
            columns: Column headings.
            rows: Rows with one value for each column, formatted as in `facts`.
            caption: Caption below the table.
            align: One letter for each column, `l` (left) or `r` (right). Default: right for columns of numbers.

        Raises:
            ValueError: The length of a row or of `align` differs from the number of columns.
        """
        cells = [[markup.cell(value) for value in row] for row in rows]
        for row in cells:
            if len(row) != len(columns):
                raise ValueError(
                    f"a row has {len(row)} values; expected one for each of the {len(columns)} columns: {row}"
                )
        if align is None:
            align = "".join(_side([row[column] for row in cells]) for column in range(len(columns)))
        if len(align) != len(columns) or set(align) - set("lr"):
            raise ValueError(f"align is {align!r}; expected one letter, l or r, for each of the {len(columns)} columns")
        return self._add("table", columns=columns, rows=cells, caption=caption, align=align)

    def figure(self, figure: Figure | str, caption: str, alt: str, wide: bool | None = None) -> Section:
        """Add a figure in its current state; later changes to it are not shown.

        Args:
            figure: A matplotlib figure (see `penult.report.figures`), or an SVG document as text.
            caption: Caption below the figure.
            alt: One sentence that describes the figure to readers who cannot see it.
            wide: Whether the figure keeps its size on a narrow screen and scrolls, instead of shrinking. Default: for
                figures with a fixed layout, such as several panels or cells with numbers.

        Raises:
            ValueError: `alt` is empty, or an SVG document contains anything but drawing elements.
        """
        drawings = [figure]
        if isinstance(figure, Figure) and not wide:
            narrow = figures.compact(figure)
            drawings += [] if narrow is None else [narrow]
            wide = wide is None and narrow is None and not figures.is_narrow(figure)
        svgs = [figures.svg(drawing, alt, prefix=f"figure{next(self._pictures)}") for drawing in drawings]
        return self._add("figure", svgs=svgs, caption=caption, alt=alt, wide=wide)

    def pictures(self, items: Sequence[Mapping[str, Any]]) -> Section:
        """Add pictures in rows that wrap at the width of the page; see `penult.report.thumbnails.gallery`.

        Args:
            items: For each picture a mapping with its PNG in base64 (`data`), `alt`, `width` and `height` in CSS
                pixels, whether its pixels are shown as squares (`pixelated`), and the `lines` below it.
        """
        return self._add("pictures", items=items)

    def code(self, code: str, label: str = "Code") -> Section:
        """Add preformatted text; `label` is its name for screen readers."""
        return self._add("code", code=code.strip("\n"), label=label)


class Page:
    r"""A page of sections, in the order in which they were added.

    The same calls give the same bytes: a page contains no date, no random id and no path.

    Args:
        title: Title of the page.
        subtitle: Short line above the title.
        lead: One or two sentences below the title that summarize the page.
        footer: Line at the end, such as the command that made the page.

    Example:
        >>> page = Page("Digits", lead="The head of a small network.")
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
        """Add an empty section and return it.

        Args:
            title: Heading of the section.
            text: First paragraphs.
            id: Anchor for links to `#id`. Default: made from the title.

        Raises:
            ValueError: `id` is taken, or is not lower-case words joined by hyphens.
        """
        taken = {section.id for section in self.sections} | {"content", "contents"}
        if id is None:
            name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
            id = next(candidate for candidate in _numbered(name) if candidate not in taken)
        elif id in taken or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", id):
            raise ValueError(
                f"id is {id!r}; expected lower-case words joined by hyphens that no other section has as id"
            )
        section = Section(title, id, self._pictures)
        self.sections.append(section)
        return section if text is None else section.text(text)

    def html(self) -> str:
        """Return the page as one HTML document."""
        template = _environment().get_template("page.html.jinja")
        return markup.seen(template.render(page=self, themes=THEMES, font=inline.FONT))

    def write(self, path: str | Path) -> Path:
        """Write the page to a file atomically and return its path."""
        return io.write_bytes(path, self.html().encode())


def _side(cells: Sequence[str]) -> str:
    """Return the alignment of a column: `r` if all of its non-empty cells are numbers, else `l`."""
    filled = [cell for cell in cells if cell not in ("", "–")]
    return "r" if filled and all(map(markup.is_number, filled)) else "l"


def _numbered(name: str) -> Iterator[str]:
    """Iterate over a name and its numbered variants: `name`, `name-2`, `name-3`, ..."""
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
