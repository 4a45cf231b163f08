"""Inline markup of the text of pages, and the format of numbers."""

from __future__ import annotations

import re
from numbers import Integral, Real
from typing import Any

from markupsafe import Markup, escape

_INLINE = re.compile(
    r"`(?P<code>[^`]+)`"
    # No "**" inside: otherwise the search for each unclosed "**" would run to the end of the text.
    r"|(?<![\w*])\*\*(?P<strong>\S(?:(?:(?!\*\*).)*?\S)?)\*\*(?![\w*])"
    r"|(?<![\w*])\*(?P<em>[^\s*](?:[^*]*[^\s*])?)\*(?![\w*])",
    re.DOTALL,
)
# Control characters and lone surrogates, which HTML does not allow, and marks that change the direction of text.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_NUMBER = re.compile(r"[\s*≤≥<>~≈±+−-]*[.]?\d")


def inline(text: str) -> Markup:
    """Escape a text and convert `` `code` ``, ``**strong**`` and ``*emphasis*`` to HTML.

    Marks do not nest, and count only at word boundaries: `2 * 3 * 4` and `2**3` are unchanged.

    Example:
        >>> print(inline("**p** < `a & b`"))
        <strong>p</strong> &lt; <code>a &amp; b</code>
    """
    pieces, end = [], 0
    for match in _INLINE.finditer(text):
        tag = str(match.lastgroup)
        pieces.append(escape(text[end : match.start()]))
        pieces.append(Markup("<{0}>{1}</{0}>").format(Markup(tag), match[tag]))
        end = match.end()
    return Markup("").join([*pieces, escape(text[end:])])


def seen(document: str) -> str:
    r"""Replace characters that a page cannot show by the replacement character, U+FFFD.

    These are control characters, lone surrogates (from file names that are not UTF-8), and marks that change the
    direction of all text after them.

    Example:
        >>> seen("a\x1bb\u202ec\ud800\n")
        'a\ufffdb\ufffdc\ufffd\n'
    """
    return _UNSEEN.sub("\ufffd", document)


def paragraphs(text: str) -> list[Markup]:
    r"""Split a text at blank lines and convert each paragraph to HTML.

    Example:
        >>> [str(part) for part in paragraphs("one\n\n*two*")]
        ['one', '<em>two</em>']
    """
    return [inline(part.strip()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def cell(value: Any) -> str:
    """Format the value of a table cell or headline number: text as it is, numbers short, None and NaN as a dash.

    Zero-dimensional arrays and tensors are formatted as their number.

    Example:
        >>> cell(60000), cell(0.98765), cell(2e-7), cell(None), cell("**.99**")
        ('60,000', '0.9877', '2e−7', '–', '**.99**')
    """
    if not isinstance(value, (str, Real)) and hasattr(value, "item"):
        value = value.item()
    if value is None or value != value:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Integral):
        return f"{int(value):,}".replace("-", "−")
    if isinstance(value, Real):
        return re.sub(r"e([+-])0*", r"e\1", f"{float(value):.4g}").replace("e+", "e").replace("-", "−")
    return str(value)


def number(value: float, spec: str) -> str:
    """Format a number with a true minus sign.

    Example:
        >>> number(-0.5, ".2f")
        '−0.50'
    """
    return format(value, spec).replace("-", "−")


def percent(value: float) -> str:
    """Format a fraction in percent with at most three significant digits.

    Example:
        >>> percent(0.05), percent(0.05321), percent(1.0), percent(0.0004)
        ('5 %', '5.32 %', '100 %', '0.04 %')
    """
    return f"{100 * value:.3g} %"


def shorten(text: str, letters: int = 24) -> str:
    """Cut a long text, such as the name of a class, so that it fits into a figure.

    Example:
        >>> shorten("a long name", 8), shorten("short", 8)
        ('a long …', 'short')
    """
    return text if len(text) <= letters else text[: letters - 1] + "…"


def is_number(text: str) -> bool:
    """Return whether a table cell begins with a number; columns of numbers are aligned to the right.

    Example:
        >>> is_number("**.915** ± .003"), is_number("≤ 1e-9"), is_number("ResNet 20")
        (True, True, False)
    """
    return _NUMBER.match(text) is not None
