"""From a finished SVG document to one that can stand inside an HTML page, or alone in a chosen theme."""

from __future__ import annotations

import re
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from penult.report import markup
from penult.report.palette import Theme, recolour

FONT = (
    'ui-sans-serif,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","Noto Sans",'
    '"Liberation Sans",Arial,sans-serif'
)
_DRAWN = frozenset(
    "svg g defs path use text tspan clipPath image rect circle ellipse line polyline polygon "
    "linearGradient radialGradient stop pattern".split()
)
_DROPPED = frozenset(["metadata", "style", "title", "desc"])
_GEOMETRY = ("d", "x", "y", "width", "height", "points")
_PAINT = ("fill", "stroke", "stop-color", "color")
_REFERENCE = re.compile(r"(?<=^href:#).+|(?<=url\(#)[^)]+")


def clean(source: str, alt: str, prefix: str, theme: Theme | None = None) -> str:
    """Make an SVG document safe, small and theme-aware.

    Keeps drawing elements only; colours of the palette become CSS variables (or a theme's colours), fonts the
    page's own, ids `prefix` and a number, and the size a `viewBox` that scales.

    Args:
        source: an SVG document, such as matplotlib writes.
        alt: what the picture shows, for those who don't see it.
        prefix: begins every id, so that two pictures can share a page.
        theme: draw a document of its own in this theme on its solid paper; without it, an inline one.

    Raises:
        ValueError: `alt` is empty, or the document holds a script, a link out or anything else but drawing.
    """
    if not alt.strip():
        raise ValueError("a figure needs a non-empty alt: one sentence on what it shows")
    root = ElementTree.fromstring(markup.seen(source))  # no XML may hold control characters, such as a name may
    _prune(root)
    width, height = (float(size) for size in root.attrib["viewBox"].split()[2:])
    names: dict[str, str] = {}
    for element in root.iter():
        _check(element)
        for key, value in list(element.attrib.items()):
            if key == "style":
                element.set(key, _style(value, theme))
            elif key in _GEOMETRY:
                element.set(key, _shorten(value))
            elif key in _PAINT:
                element.set(key, recolour(value, theme))
            elif key == "transform" and value.startswith(("rotate(-0 ", "rotate(0 ")):
                del element.attrib[key]
            for name in _REFERENCE.findall(f"{key}:{value}"):
                names.setdefault(name, f"{prefix}_{len(names)}")
    _rename(root, names)
    _hoist(root)
    ink = recolour("#000000", theme)
    root.attrib = {
        "class": "chart",
        "role": "img",
        "aria-label": alt,
        "viewBox": f"0 0 {width:g} {height:g}",
        "style": f"--width:{width:g}px;fill:{ink};stroke-linejoin:round;stroke-linecap:butt",
    }
    if theme is not None:
        size = {"width": f"{width:g}", "height": f"{height:g}"}
        root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "font-family": FONT, **size}
        root.insert(0, Element("rect", {**size, "style": f"fill:{recolour('#ffffff', theme)}"}))
    return ElementTree.tostring(root, encoding="unicode")


def _prune(parent: Element) -> None:
    """Strip namespaces, what is not drawn, and the white space between elements."""
    parent.tag = parent.tag.rpartition("}")[2]
    parent.attrib = {key.rpartition("}")[2]: value for key, value in parent.attrib.items()}
    if parent.tag not in ("text", "tspan"):
        parent.text = None
    for child in list(parent):
        _prune(child)
        if parent.tag not in ("text", "tspan"):
            child.tail = None
        if child.tag in _DROPPED or (child.tag in ("g", "defs") and not len(child)):
            parent.remove(child)


def _check(element: Element) -> None:
    if element.tag not in _DRAWN:
        raise ValueError(f"an SVG on a page is made of drawing elements: <{element.tag}> is none")
    inside = ("#", "data:image/") if element.tag == "image" else "#"
    for key, value in element.attrib.items():
        if key.startswith("on") or (key == "href" and not value.startswith(inside)):
            raise ValueError(f"an SVG on a page runs and loads nothing: <{element.tag}> has {key}={value!r}")
        if re.search(r"url\((?!#)", value):
            raise ValueError(f"an SVG on a page refers to its own parts: <{element.tag}> has {value!r}")


def _style(style: str, theme: Theme | None) -> str:
    """Rewrite the declarations of one style attribute: palette colours, and the font of the page."""
    declarations = []
    for declaration in filter(str.strip, style.split(";")):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":  # the shorthand of matplotlib < 3.11: weight, size, families
            before, size = re.findall(r"^(.*?)([\d.]+px)", value)[0]
            weight = re.findall(r"bold|\d{3}", before)
            declarations += [f"font-size:{size}", *(f"font-weight:{each}" for each in weight)]
        elif name != "font-family":
            value = re.sub(r"#[0-9a-fA-F]{6}\b", lambda match: recolour(match[0], theme), value)
            declarations.append(f"{name}:{value}")
    return ";".join(declarations)


def _shorten(value: str) -> str:
    """Write coordinates to a hundredth of a pixel, on one line."""
    numbers = re.sub(r"-?\d+\.\d+", lambda match: f"{round(float(match[0]), 2) + 0.0:g}", value)
    return " ".join(numbers.split())


def _rename(root: Element, names: dict[str, str]) -> None:
    """Give what is referred to its new id, and take away every other."""
    for element in root.iter():
        old = element.attrib.pop("id", None)
        if old in names:
            element.set("id", names[old])
        for key, value in element.attrib.items():
            renamed = _REFERENCE.sub(lambda match: names[match[0]], f"{key}:{value}")
            element.set(key, renamed.partition(":")[2])


def _hoist(root: Element) -> None:
    """Write a style that all points of a cloud share once, on their group."""
    for group in root.iter("g"):
        uses = [child for child in group if child.tag == "use"]
        styles = {use.get("style", "") for use in uses}
        if len(uses) == len(group) > 1 and len(styles) == 1 and "style" not in group.attrib:
            style = styles.pop()
            if not re.search(r"(^|;)opacity:", style):
                group.set("style", style)
                for use in uses:
                    use.attrib.pop("style", None)
