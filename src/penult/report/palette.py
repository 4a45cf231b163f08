"""Named colours of pages and figures, for a light and a dark theme.

Figures are drawn in the colours of the light theme. No two names have the same hex code, so each code in a finished
SVG identifies a name and can be replaced by the CSS variable of that name.

The ten series colours have the same hue in both themes and a contrast of at least 3 to the background, and they stay
distinct for colour-blind readers. Numbers are readable on every level of the ramps.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from matplotlib.colors import LinearSegmentedColormap, ListedColormap, to_hex

Theme: TypeAlias = Literal["light", "dark"]

LEVELS = 21


def _named(name: str, colours: str) -> dict[str, str]:
    return {f"{name}-{position}": colour for position, colour in enumerate(colours.split(), start=1)}


def _ramp(name: str, anchors: str) -> dict[str, str]:
    """Return `LEVELS` evenly spaced colours through the anchors, named `name-0`, `name-1`, ..."""
    levels = LinearSegmentedColormap.from_list(name, anchors.split(), N=LEVELS)
    return {f"{name}-{level}": to_hex(levels(level)) for level in range(LEVELS)}


LIGHT: dict[str, str] = {
    "paper": "#fbfaf8",
    "surface": "#f3f1ec",
    "ink": "#1a212c",
    "muted": "#58616e",
    "line": "#dfdcd5",
    "accent": "#2456a8",
    "on-low": "#06080b",
    "on-high": "#fefefe",
    **_named("series", "#2457cf #c8552b #2a8c76 #a3264f #7a2ba0 #b98a00 #2398dc #6a2d0c #e055a8 #2b3560"),
    **_ramp("sequential", "#edf1f7 #a3bfe8 #487dc9 #28569f #122c63"),
    **_ramp("diverging", "#123a7c #4f82c8 #f0eeea #c26638 #86300c"),
}

DARK: dict[str, str] = {
    "paper": "#14171c",
    "surface": "#1d2128",
    "ink": "#e7eaef",
    "muted": "#9ca5b2",
    "line": "#323944",
    "accent": "#8db8ff",
    "on-low": "#fdfdfd",
    "on-high": "#060709",
    **_named("series", "#5b93ff #ff8a52 #35c295 #f0476a #9a68cc #ffd552 #7fc8ff #b5622a #eda2d4 #8a92a0"),
    **_ramp("sequential", "#1c2330 #233f6e #3471be #74aeea #d6e9fb"),
    **_ramp("diverging", "#9ac6ff #3c6cb0 #232830 #b0592d #ffb48a"),
}

THEMES: dict[Theme, dict[str, str]] = {"light": LIGHT, "dark": DARK}

SERIES: list[str] = [colour for name, colour in LIGHT.items() if name.startswith("series-")]


def _colormap(name: str) -> ListedColormap:
    return ListedColormap([LIGHT[f"{name}-{level}"] for level in range(LEVELS)], name=name)


SEQUENTIAL = _colormap("sequential")
DIVERGING = _colormap("diverging")

# Levels of each ramp on which numbers are written in `on-high`; on all other levels they are written in `on-low`.
STRONG: dict[str, list[int]] = {"sequential": list(range(11, 21)), "diverging": [*range(5), *range(16, 21)]}

# Black and white are matplotlib's own colours of text and backgrounds, outside the house style.
_NAMES = {"#000000": "ink", "#ffffff": "paper"} | {colour: name for name, colour in LIGHT.items()}


def recolour(colour: str, theme: Theme | None) -> str:
    """Return a colour of a drawn figure in a theme, or as a CSS variable if `theme` is None.

    Colours that are not in the palette are returned unchanged.

    Example:
        >>> recolour("#1a212c", None), recolour("#1a212c", "dark"), recolour("#123456", "dark")
        ('var(--ink,#1a212c)', '#e7eaef', '#123456')
    """
    name = _NAMES.get(colour.lower())
    if name is None:
        return colour
    return f"var(--{name},{LIGHT[name]})" if theme is None else THEMES[theme][name]
