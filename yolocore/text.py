"""Text that comes from files, made fit for one line of a message, a table or a picture."""

import unicodedata

_UNFIT = frozenset(("Cc", "Cs", "Zl", "Zp"))
"""Unicode categories: control characters, half characters, line and paragraph separators."""


def is_unicode(text: str) -> bool:
    """Whether text can be written at all: JSON and YAML can spell half characters, which no encoding has."""
    return all(unicodedata.category(char) != "Cs" for char in text)


def one_line(text: str) -> str:
    """Text without line breaks and without codes that a terminal would obey.

    Args:
        text: A class name, say, or a name that a foreign file gives.

    Returns:
        The text with such characters written as in a Python string.
    """
    return "".join(
        char.encode("unicode_escape").decode("ascii") if unicodedata.category(char) in _UNFIT else char for char in text
    )
