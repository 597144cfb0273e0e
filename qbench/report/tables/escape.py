"""Escapes text for each format of a table.

Names, reasons and notes come from files that anybody may have written. Such text must not act as control sequences,
markup, formulas or commands in any format.
"""

import re

# ruff: noqa: RUF001
TAG = re.compile(r"<(?=[A-Za-z/!?])")
"""The start of text that Markdown would interpret as an HTML tag."""
ENTITY = re.compile(r"&(?=#?\w+;)")
"""The start of text that Markdown would interpret as a character reference."""
LINK = re.compile(r"\](?=[(\[:])")
"""The end of the text of a link, an image or a link definition in Markdown."""
FORMULA = "=@＝＠"  # spreadsheets read the full-width signs too
SIGNS = "+-＋－"
NUMBER = re.compile(r"[+-]?[\d.]*[\d.,:;±+% -]*[A-Za-z]{0,3}")
"""A number, possibly with an error and a unit. Such text is not dangerous in spreadsheets."""
LATEX = {
    "\\": r"\textbackslash{}", "±": r"$\pm$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "[": "{[}", "*": "{*}",  # LaTeX would read a plain [ or * as an argument of the \\ that ends a row
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}  # fmt: skip


def printable(text: str, keep: str = "") -> str:
    """Return text as one line without control characters, for a terminal, a plot or a page.

    Characters that cannot be printed are written as in Python strings, such as `\\x1b`. Characters
    in `keep` are not changed.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else repr(c)[1:-1] for c in text)


def markdown(text: str, *, links: bool = False) -> str:
    """Return text for GitHub Markdown and its table cells. HTML and column borders are escaped.

    If `links` is true, links are not escaped. Only qbench's own documents use this option.
    """
    text = printable(text).replace("\\", "\\\\").replace("|", "\\|")
    text = TAG.sub("&lt;", ENTITY.sub("&amp;", text))
    return text if links else LINK.sub(r"\\]", text)


def csv(text: str) -> str:
    """Return text for a cell of a CSV file. A leading `'` keeps spreadsheets from reading the text as a formula."""
    text = printable(text)
    is_formula = text.lstrip().startswith(tuple(FORMULA))
    is_formula |= text.lstrip().startswith(tuple(SIGNS)) and not NUMBER.fullmatch(text)
    return f"'{text}" if is_formula else text


def latex(text: str) -> str:
    """Return text for a cell of a LaTeX table."""
    return "".join(LATEX.get(c, c) for c in printable(text))


def latex_comment(text: str) -> str:
    """Return text as a LaTeX comment on one line. Text on a second line could be a command."""
    return f"% {printable(text)}"
