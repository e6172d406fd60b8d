"""A report, declared once: terminal, JSON, pictures, page and notebook show the same objects.

No text is taken for markup, neither rich's nor HTML's, and control characters are removed: names,
notes, folders and equations are shown as they are.
"""

import base64
import dataclasses
import functools
import html
import io
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text as RichText

from lopt.experiment.report import plots, statistics
from lopt.experiment.report.statistics import Cell, Interval, Measured, plain
from lopt.experiment.runs.files import write_bytes, write_json

# The version of report files, which changes with their keys.
FORMAT = 2
# Longer texts in cells are folded; headings and numbers never are.
LONGEST_WORD = 24

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
img { max-width: 100%; } img.equation { display: block; margin: 1rem 0; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; } caption { text-align: left; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }
th.text, td.text { text-align: left; } tr.strong { font-weight: bold; }
"""


@dataclasses.dataclass(frozen=True)
class Text:
    """A paragraph; a heading; or `code`, which keeps its spaces."""

    text: str
    _: dataclasses.KW_ONLY
    code: bool = False
    heading: bool = False

    def print(self, console: Console) -> None:
        """Prints the text."""
        text = RichText(plain(self.text), style="bold" if self.heading else "")
        console.print(text, soft_wrap=self.code)

    def html(self) -> str:
        """Returns an element of a page."""
        tag = "h2" if self.heading else "pre" if self.code else "p"
        return f"<{tag}>{_escaped(self.text)}</{tag}>"

    def json(self) -> Any:
        """Returns the text."""
        return {"heading": self.text} if self.heading else {"text": self.text}


@dataclasses.dataclass(frozen=True)
class Equation(Text):
    """An equation: as text in the terminal, typeset on pages."""

    latex: str
    _: dataclasses.KW_ONLY
    code: bool = True

    def html(self) -> str:
        """Returns the equation typeset, as far as matplotlib can, or as text."""
        from matplotlib.mathtext import math_to_image

        buffer = io.BytesIO()
        try:
            math_to_image(f"${self.latex}$", buffer, format="svg")
        except ValueError:  # LaTeX that matplotlib does not know
            return super().html()
        return _image(buffer.getvalue(), "svg+xml", self.text, "equation")

    def json(self) -> Any:
        """Returns both forms."""
        return {"equation": self.text, "latex": self.latex}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: rows of cells by heading, all with the headings of the first; some are `strong`."""

    title: str
    rows: Sequence[Mapping[str, Cell]]
    strong: Sequence[int] = ()

    def _columns(self) -> list[tuple[str, bool, list[str]]]:
        """Returns of each column its heading, whether it is text, and its cells as text."""
        columns = []
        for name in self.rows[0] if self.rows else ():
            cells = [row.get(name) for row in self.rows]
            text = any(isinstance(cell, str) for cell in cells)
            columns.append((plain(name), text, [plain(statistics.number(one)) for one in cells]))
        return columns

    def print(self, console: Console) -> None:
        """Prints the table: texts are folded, neither numbers nor words of headings break.

        One that is wider still is printed in parts, each of which begins with the first column.
        """
        columns, least, most = self._columns(), [], []
        for name, text, cells in columns:
            words = [word for cell in cells for word in cell.split()] if text else cells
            longest = max(map(len, words), default=0)
            folded = min(longest, LONGEST_WORD) if text else longest
            least.append(max(1, folded, *map(len, name.split())))
            most.append(max(1, *map(len, (name, *cells))))
        fitting = sum(_total(least[: i + 1]) <= console.width for i in range(len(least)))
        if 2 <= fitting < len(columns):
            first, *names = self.rows[0]
            for title, some in ((self.title, names[: fitting - 1]), ("", names[fitting - 1 :])):
                rows = [{name: row.get(name) for name in (first, *some)} for row in self.rows]
                Table(title, rows, self.strong).print(console)
            return
        # The widest columns are folded first.
        limits = (np.clip(limit, least, most) for limit in range(console.width, 0, -1))
        widths = next((one for one in limits if _total(one) <= console.width), np.array(least))
        table = RichTable(
            title=RichText(plain(self.title)), title_justify="left", width=_total(widths)
        )
        for (name, text, _), width in zip(columns, widths, strict=True):
            justify: Any = "left" if text else "right"
            table.add_column(RichText(name), justify=justify, width=width, overflow="fold")
        for i, row in enumerate(zip(*(cells for *_, cells in columns), strict=True)):
            table.add_row(*map(RichText, row), style="bold" if i in self.strong else None)
        console.print(table, crop=False)

    def html(self) -> str:
        """Returns an element of a page."""
        columns, lines = self._columns(), [f"<table><caption>{_escaped(self.title)}</caption>"]
        for i in range(-1, len(self.rows)):
            lines.append('<tr class="strong">' if i in self.strong else "<tr>")
            for name, text, cells in columns:
                tag, cell = ("td", cells[i]) if i >= 0 else ("th", name)
                kind = ' class="text"' * text
                lines[-1] += f"<{tag}{kind}>{_escaped(cell)}</{tag}>"
        return "\n".join([*lines, "</table>"])

    def json(self) -> Any:
        """Returns rows of numbers; of a mean also its error, of an interval its ends."""

        def value(cell: Cell) -> Any:
            return dataclasses.asdict(cell) if isinstance(cell, Measured | Interval) else cell

        rows = [{name: value(cell) for name, cell in row.items()} for row in self.rows]
        return {"table": self.title, "rows": rows}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure: `draw` gets an empty one of so many inches; `data` are numbers for the JSON."""

    name: str
    draw: Callable[[Any], object]
    size: tuple[float, float] = (6.4, 3.8)
    caption: str = ""
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def png(self) -> bytes:
        """The content of a PNG file."""
        figure = plots.new_figure(*self.size)
        self.draw(figure)
        return plots.png(figure)

    def print(self, console: Console) -> None:
        """Prints nothing: files are named at the end."""

    def html(self) -> str:
        """Returns an element of a page, with the picture inside."""
        picture = _image(self.png, "png", self.caption or self.name)
        return f"<p>{picture}<br>{_escaped(self.caption)}</p>"

    def json(self) -> Any:
        """Returns the name of the file, and the numbers."""
        return {"figure": f"{self.name}.png", "caption": self.caption, **self.data}


def curves(
    name: str,
    found: Mapping[str, Mapping[str, plots.Curve]],
    caption: str = "",
    columns: int = 3,
    most: int | None = None,
    steps: Sequence[int] | Sequence[float] | None = None,
    points: int = 40,
    **style: Any,
) -> Figure:
    """Returns a figure with a panel of `plots.bands` for each title, in `columns` side by side.

    At most so many are drawn; of all of them the JSON has means and errors at so many points. Of
    `style`, which is that of `bands`, each can be a value for all panels, or values by title.
    """
    drawn = [curve for panel in found.values() for curve in panel.values()]
    lengths = [len(one[0]) for one in drawn if not isinstance(one, Mapping) and np.ndim(one) == 2]
    places: Any = range(1, max(lengths, default=0) + 1) if steps is None else steps
    at = np.array(statistics.shown_steps(len(places), points), int) - 1
    shown = list(found)[:most]

    def draw(figure: Any) -> None:
        explained: list[list[str]] = []
        every = plots.panels(figure, len(shown), columns, (4.6, 3.4))
        for axes, title in zip(every, shown, strict=True):
            own: Any = {"legend": list(found[title]) not in explained, "title": title}
            explained.append(list(found[title]))
            for key, value in style.items():
                if not isinstance(value, Mapping) or title in value:
                    own[key] = value[title] if isinstance(value, Mapping) else value
            plots.bands(axes, found[title], steps=places, **own)

    def numbers(curve: plots.Curve) -> dict[str, Any]:
        own = {"steps": [*curve]} if isinstance(curve, Mapping) else {}
        values = [*curve.values()] if isinstance(curve, Mapping) else np.asarray(curve).T
        by_step = np.asarray(values, float)
        chosen = by_step[at[at < len(by_step)]] if by_step.ndim == 2 and not own else by_step
        mean, error = statistics.mean_and_error(chosen.T)
        return {**own, "mean": mean.tolist(), "error": None if error is None else error.tolist()}

    content = {
        title: {one: numbers(values) for one, values in panel.items()}
        for title, panel in found.items()
    }
    data = {"steps": [places[i] for i in at], "curves": content}
    more = len(found) - len(shown)
    caption += f" {more} more panels are in the JSON file." * (more > 0)
    return Figure(name, draw, caption=caption, data=data)


Part = Text | Table | Figure


@dataclasses.dataclass
class Report:
    """Tables, figures, equations and sentences, in their order."""

    title: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what was asked for
    # Numbers for the JSON that no part has.
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: list[Part] = dataclasses.field(default_factory=list)
    # Places of the parts that are not shown in the terminal.
    details: set[int] = dataclasses.field(default_factory=set)

    def add(self, part: Part, *, detail: bool = False) -> None:
        """Adds a part; a detail is not printed in the terminal."""
        if detail:
            self.details.add(len(self.parts))
        self.parts.append(part)

    def heading(self, text: str, below: str = "", *, detail: bool = True) -> None:
        """Adds a heading, and a paragraph below it."""
        self.add(Text(text, heading=True), detail=detail)
        self.text(below, detail=detail)

    def text(self, text: str, *, code: bool = False, detail: bool = False) -> None:
        """Adds a paragraph, unless it is empty."""
        if text:
            self.add(Text(text, code=code), detail=detail)

    def table(self, title: str, rows: Any, strong: Any = (), *, detail: bool = False) -> None:
        """Adds a `Table`, unless it would be empty."""
        if rows:
            self.add(Table(title, rows, strong), detail=detail)

    def figure(
        self, name: str, draw: Any, size: Any = (6.4, 3.8), caption: str = "", **data: Any
    ) -> None:
        """Adds a `Figure`; `data` are numbers for the JSON."""
        self.add(Figure(name, draw, size, caption, data))

    def show(self, console: Console | None = None) -> None:
        """Prints the report in the terminal."""
        for i, part in enumerate(self.parts):
            if i not in self.details:
                part.print(console or Console())

    def json(self) -> dict[str, Any]:
        """Returns the content of the JSON file."""
        head = {"format": FORMAT, "lopt": version("lopt"), "jax": version("jax")}
        head |= {"title": self.title, "settings": dict(self.settings), **self.data}
        return head | {"parts": [part.json() for part in self.parts]}

    def _repr_html_(self) -> str:
        body = "\n".join(part.html() for part in self.parts)
        return f"<h1>{_escaped(self.title)}</h1>\n{body}"

    def save(self, folder: Path, name: str = "report") -> list[str]:
        """Writes NAME.json, NAME.html and a PNG of each figure; returns the names of the files."""
        page = (
            f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
            f"<title>{_escaped(self.title)}</title>\n<style>{_STYLE}</style>\n"
            f"{self._repr_html_()}\n</html>\n"
        )
        write_json(folder / f"{name}.json", self.json())
        files = {f"{name}.html": page.encode()}
        files |= {f"{part.name}.png": part.png for part in self.parts if isinstance(part, Figure)}
        for file, content in files.items():
            write_bytes(folder / file, content)
        return [f"{name}.json", *files]

    def finish(self, folder: Path, name: str) -> None:
        """Shows and saves the report, and says which files were written."""
        self.show()
        tell(f"Wrote {', '.join(self.save(folder, name))} in {folder}.")


def tell(text: str) -> None:
    """Prints a line, however long, as it is."""
    Text(text, code=True).print(Console())


def _total(widths: Any) -> int:
    """Returns the width of a table with columns so wide."""
    return 1 + int(np.sum(np.add(widths, 3)))


def _escaped(text: str) -> str:
    return html.escape(plain(text))


def _image(content: bytes, kind: str, what: str, style: str = "") -> str:
    data = base64.b64encode(content).decode()
    return f'<img class="{style}" alt="{_escaped(what)}" src="data:image/{kind};base64,{data}">'
