"""Names as text, whatever they are, in files that programs show."""

from __future__ import annotations

import re

# What makes a tag, an entity, a link, an image, code, emphasis or a cell of Markdown.
_MARKS = re.compile(r"([\\`*<|&]|\](?=[(\[:]))")


def utf8(text: str) -> bytes:
    """The text as a file holds it; of what is no character (half of a pair) its code."""
    return text.encode("utf-8", "backslashreplace")


def markdown_text(text: str) -> str:
    """On one line of Markdown, to be read as it stands."""
    return _MARKS.sub(r"\\\1", " ".join(text.split()))
