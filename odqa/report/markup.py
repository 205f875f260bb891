"""HTML made of values: text that goes in is escaped, because only `el` makes markup, and it escapes all that is not.

Nothing here knows an evaluation. There is no other way from a string to markup, but for `Html` itself, which is called
for constants of this package alone (its style sheet and its script).
"""

import html
import unicodedata
from collections.abc import Iterable

_VOID = frozenset({"meta", "input", "br", "hr", "line", "rect", "circle", "path", "polyline", "polygon"})


class Html(str):
    """Markup that is safe to put into a page as it is."""

    __slots__ = ()


Child = str | Iterable["Child"] | None
"""What goes into an element: text (escaped), `Html` (as it is), a sequence of both, or nothing."""


def el(tag: str, *children: Child, **attributes: str | float | bool | None) -> Html:
    """An element. Attributes: `class_` is class, `aria_label` is aria-label; None and False leave one out."""
    parts = [tag]
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        key = name.rstrip("_").replace("_", "-")
        parts.append(key if value is True else f'{key}="{html.escape(visible(str(value)), quote=True)}"')
    opening = f"<{' '.join(parts)}>"
    if tag in _VOID and not children:
        return Html(opening.removesuffix(">") + ("/>" if tag not in ("meta", "input", "br", "hr") else ">"))
    return Html(f"{opening}{inside(*children)}</{tag}>")


def inside(*children: Child) -> Html:
    """Children one after the other, without an element around them."""
    parts: list[str] = []
    for child in children:
        if isinstance(child, Html):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(html.escape(visible(child), quote=True))
        elif child is not None:
            parts.append(inside(*child))
    return Html("".join(parts))


def visible(text: str) -> str:
    """Control, private and surrogate characters, and those that turn the direction of text, as blanks."""
    return "".join(" " if _is_hidden(character) else character for character in text)


def _is_hidden(character: str) -> bool:
    is_bidi = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return is_bidi or unicodedata.category(character) in ("Cc", "Co", "Cs")
