"""The little markup that a page's text may hold, and how a page writes numbers."""

from __future__ import annotations

import re
from numbers import Integral, Real
from typing import Any

from markupsafe import Markup, escape

_INLINE = re.compile(
    r"`(?P<code>[^`]+)`"
    # no "**" inside, or each that nothing closes would be looked for to the end of the text
    r"|(?<![\w*])\*\*(?P<strong>\S(?:(?:(?!\*\*).)*?\S)?)\*\*(?![\w*])"
    r"|(?<![\w*])\*(?P<em>[^\s*](?:[^*]*[^\s*])?)\*(?![\w*])",
    re.DOTALL,
)
# Control characters and halves of pairs, which no page may hold, and what turns round or embeds the text behind it.
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
_NUMBER = re.compile(r"[\s*≤≥<>~≈±+−-]*[.]?\d")


def inline(text: str) -> Markup:
    """Escape a text and turn `` `code` ``, ``**strong**`` and ``*emphasis*`` into HTML.

    Marks do not nest, and stand only at word boundaries: `2 * 3 * 4` and `2**3` stay as they are.

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
    r"""Put a replacement character where a document, finished or not, holds what cannot be shown as it is.

    These are control characters, lone surrogates (of file names that are no UTF-8) and marks that change the direction
    of what stands behind them, beyond the name that brought them.

    Example:
        >>> seen("a\x1bb\u202ec\ud800\n")
        'a\ufffdb\ufffdc\ufffd\n'
    """
    return _UNSEEN.sub("\ufffd", document)


def paragraphs(text: str) -> list[Markup]:
    r"""Split a text at its blank lines and mark up each paragraph.

    Example:
        >>> [str(part) for part in paragraphs("one\n\n*two*")]
        ['one', '<em>two</em>']
    """
    return [inline(part.strip()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def cell(value: Any) -> str:
    """Write a value of a table or a fact: text as it is, numbers short, nothing as a dash.

    Zero-dimensional arrays and tensors count as the number they hold.

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


def is_number(text: str) -> bool:
    """Say whether a table's cell reads as a number, so that its column stands to the right.

    Example:
        >>> is_number("**.915** ± .003"), is_number("≤ 1e-9"), is_number("ResNet 20")
        (True, True, False)
    """
    return _NUMBER.match(text) is not None
