"""Conversion of SVG documents to small, safe SVG elements for HTML pages, or to files in one theme."""

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
    """Return an SVG document without anything but drawing elements, small and in the colours of a theme.

    Colours of the palette become CSS variables, or the colours of `theme`. Fonts are removed, so that text has the
    font of the page. Ids become `prefix` and a number. The size becomes a `viewBox`, so that the picture scales.

    Args:
        source: An SVG document, for example from matplotlib.
        alt: One sentence that describes the picture to readers who cannot see it.
        prefix: Prefix of all ids, so that two pictures can share a page.
        theme: Theme of a document for a file of its own, with a solid background. None: an element for a page.

    Raises:
        ValueError: `alt` is empty, or the document contains a script, an external link or any other element that
            does not draw.
    """
    if not alt.strip():
        raise ValueError("alt is empty; expected one sentence that describes the figure")
    # Names of classes may contain control characters, which XML does not allow.
    root = ElementTree.fromstring(markup.seen(source))
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
    """Remove namespaces, elements that draw nothing, and white space between elements."""
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
    """Raise unless an element only draws, and refers to nothing outside the document."""
    if element.tag not in _DRAWN:
        raise ValueError(f"an SVG on a page may contain drawing elements only; this one has <{element.tag}>")
    inside = ("#", "data:image/") if element.tag == "image" else "#"
    for key, value in element.attrib.items():
        if key.startswith("on") or (key == "href" and not value.startswith(inside)):
            raise ValueError(f"an SVG on a page may not run or load anything; <{element.tag}> has {key}={value!r}")
        if re.search(r"url\((?!#)", value):
            raise ValueError(f"an SVG on a page may refer only to its own parts; <{element.tag}> has {value!r}")


def _style(style: str, theme: Theme | None) -> str:
    """Return a style attribute with its colours in a theme and without font families."""
    declarations = []
    for declaration in filter(str.strip, style.split(";")):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font":
            # matplotlib before 3.11 writes the shorthand property: weight, size, families.
            before, size = re.findall(r"^(.*?)([\d.]+px)", value)[0]
            weight = re.findall(r"bold|\d{3}", before)
            declarations += [f"font-size:{size}", *(f"font-weight:{value}" for value in weight)]
        elif name != "font-family":
            value = re.sub(r"#[0-9a-fA-F]{6}\b", lambda match: recolour(match[0], theme), value)
            declarations.append(f"{name}:{value}")
    return ";".join(declarations)


def _shorten(value: str) -> str:
    """Round coordinates to a hundredth of a pixel and join them on one line."""
    numbers = re.sub(r"-?\d+\.\d+", lambda match: f"{round(float(match[0]), 2) + 0.0:g}", value)
    return " ".join(numbers.split())


def _rename(root: Element, names: dict[str, str]) -> None:
    """Rename the ids that are referred to, and remove all others."""
    for element in root.iter():
        old = element.attrib.pop("id", None)
        if old in names:
            element.set("id", names[old])
        for key, value in element.attrib.items():
            renamed = _REFERENCE.sub(lambda match: names[match[0]], f"{key}:{value}")
            element.set(key, renamed.partition(":")[2])


def _hoist(root: Element) -> None:
    """Move a style that all points of a scatter plot share to their group."""
    for group in root.iter("g"):
        uses = [child for child in group if child.tag == "use"]
        styles = {use.get("style", "") for use in uses}
        if len(uses) == len(group) > 1 and len(styles) == 1 and "style" not in group.attrib:
            style = styles.pop()
            if not re.search(r"(^|;)opacity:", style):
                group.set("style", style)
                for use in uses:
                    use.attrib.pop("style", None)
