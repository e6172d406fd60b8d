"""One self-contained HTML page: text, tables, and figures inside of the file itself."""

import base64
import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path

from lopt.experiment.files import write_bytes

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
img { max-width: 100%; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
"""


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph; `code` for what keeps its spaces."""

    text: str
    code: bool = False


@dataclasses.dataclass(frozen=True)
class Rows:
    """A table: headings, and rows of texts."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG, and what it shows."""

    png: bytes
    caption: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    heading: str
    parts: Sequence[Text | Rows | Picture]


def write_page(path: Path, title: str, sections: Sequence[Section]) -> None:
    """Writes the page, atomically; it refers to no other file and loads nothing."""
    body = "\n".join(_section(section) for section in sections)
    text = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n"
        f"<h1>{html.escape(title)}</h1>\n{body}\n</html>\n"
    )
    write_bytes(path, text.encode())


def _section(section: Section) -> str:
    parts = "\n".join(map(_part, section.parts))
    return f"<h2>{html.escape(section.heading)}</h2>\n{parts}"


def _part(part: Text | Rows | Picture) -> str:
    if isinstance(part, Text):
        tag = "pre" if part.code else "p"
        return f"<{tag}>{html.escape(part.text)}</{tag}>"
    if isinstance(part, Picture):
        data, caption = base64.b64encode(part.png).decode(), html.escape(part.caption)
        source = f"data:image/png;base64,{data}"
        return f'<p><img alt="{caption}" src="{source}"><br>{caption}</p>'
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in part.headings)
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in part.rows
    )
    return f"<table>\n<tr>{head}</tr>\n{rows}\n</table>"
