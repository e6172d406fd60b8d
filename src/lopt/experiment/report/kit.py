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
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text as RichText

from lopt.experiment.report.plots import Curve, bands, grid_size, new_figure, panels, png
from lopt.experiment.report.statistics import (
    Cell,
    Measured,
    cell_text,
    mean_and_error,
    plain,
    shown_steps,
)
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
    code: bool = False
    heading: bool = False

    def print(self, console: Console) -> None:
        """Prints the text."""
        style = "bold" if self.heading else ""
        console.print(RichText(plain(self.text), style=style), soft_wrap=self.code)

    def html(self) -> str:
        """Returns an element of a page."""
        tag = "h2" if self.heading else "pre" if self.code else "p"
        return f"<{tag}>{_escaped(self.text)}</{tag}>"

    def json(self) -> Any:
        """Returns the text."""
        return {"heading": self.text} if self.heading else {"text": self.text}


@dataclasses.dataclass(frozen=True)
class Equation:
    """An equation: as text in the terminal, typeset on pages."""

    text: str
    latex: str

    def print(self, console: Console) -> None:
        """Prints the equation as text."""
        console.print(RichText(plain(self.text)), soft_wrap=True)

    def html(self) -> str:
        """Returns the equation typeset, as far as matplotlib can, or as text."""
        from matplotlib.mathtext import math_to_image

        buffer = io.BytesIO()
        try:
            math_to_image(f"${self.latex}$", buffer, format="svg")
        except ValueError:  # LaTeX that matplotlib does not know
            return f"<pre>{_escaped(self.text)}</pre>"
        return _image(buffer.getvalue(), "svg+xml", self.text, "equation")

    def json(self) -> Any:
        """Returns both forms."""
        return {"equation": self.text, "latex": self.latex}


@dataclasses.dataclass(frozen=True)
class Table:
    """A table: rows of cells by heading, all with the headings of the first.

    Attributes:
        title: above the table.
        rows: a cell is text, a number, a mean with its error, or None.
        strong: the rows that stand out.
    """

    title: str
    rows: Sequence[Mapping[str, Cell]]
    strong: Sequence[int] = ()

    def _columns(self) -> list[tuple[str, bool, list[str]]]:
        """Returns of each column its heading, whether it is text, and its cells as text."""
        columns = []
        for name in self.rows[0] if self.rows else ():
            cells = [row.get(name) for row in self.rows]
            text = any(isinstance(cell, str) for cell in cells)
            columns.append((plain(name), text, [plain(cell_text(cell)) for cell in cells]))
        return columns

    def print(self, console: Console) -> None:
        """Prints the table: texts are folded, neither numbers nor words of headings break.

        One that is wider still is printed in parts, each of which begins with the first column.
        """
        columns = self._columns()
        widths = [max(map(len, (name, *cells))) for name, _, cells in columns]
        if _total(widths) > console.width:
            least = []
            for name, text, cells in columns:
                words = [word for cell in cells for word in cell.split()] if text else cells
                own = [min(len(word), LONGEST_WORD) if text else len(word) for word in words]
                least.append(max(*own, *map(len, name.split()), 1))
            fitting = max(n for n in range(len(least) + 1) if _total(least[:n]) <= console.width)
            if 2 <= fitting < len(least):
                first, *names = self.rows[0]
                for title, some in ((self.title, names[: fitting - 1]), ("", names[fitting - 1 :])):
                    rows = [{name: row.get(name) for name in (first, *some)} for row in self.rows]
                    Table(title, rows, self.strong).print(console)
                return
            # What room there is goes to texts, first to the shortest.
            room = max(0, console.width - _total(least))
            texts = [i for i in range(len(columns)) if columns[i][1]]
            most, widths = widths, least
            for rank, i in enumerate(sorted(texts, key=most.__getitem__)):
                given = min(most[i] - least[i], room // (len(texts) - rank))
                widths[i], room = least[i] + given, room - given
        table = RichTable(title=RichText(plain(self.title)), title_justify="left")
        for (name, text, _), width in zip(columns, widths, strict=True):
            justify: Any = "left" if text else "right"
            table.add_column(RichText(name), justify=justify, width=width, overflow="fold")
        for i, row in enumerate(zip(*(cells for *_, cells in columns), strict=True)):
            table.add_row(*map(RichText, row), style="bold" if i in self.strong else None)
        if _total(widths) > console.width:
            console = Console(file=console.file, width=_total(widths))
        console.print(table)

    def html(self) -> str:
        """Returns an element of a page."""
        columns = [(name, ' class="text"' * text, cells) for name, text, cells in self._columns()]
        head = "".join(f"<th{kind}>{_escaped(name)}</th>" for name, kind, _ in columns)
        kinds, rows = [kind for _, kind, _ in columns], []
        for i, row in enumerate(zip(*(cells for *_, cells in columns), strict=True)):
            cells = (f"<td{k}>{_escaped(cell)}</td>" for k, cell in zip(kinds, row, strict=True))
            strong = ' class="strong"' * (i in self.strong)
            rows.append(f"<tr{strong}>{''.join(cells)}</tr>")
        caption = f"<caption>{_escaped(self.title)}</caption>"
        return f"<table>{caption}\n<tr>{head}</tr>\n" + "\n".join(rows) + "\n</table>"

    def json(self) -> Any:
        """Returns rows of numbers; of a mean with its error both."""
        rows = [
            {
                name: dataclasses.asdict(cell) if isinstance(cell, Measured) else cell
                for name, cell in row.items()
            }
            for row in self.rows
        ]
        return {"table": self.title, "rows": rows}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure: a function that draws on an empty one, and what it shows.

    Attributes:
        name: of its file, without the ending.
        draw: gets an empty matplotlib figure.
        size: inches, width and height.
        caption: below the figure.
        data: numbers for the JSON.
    """

    name: str
    draw: Callable[[Any], object]
    size: tuple[float, float] = (6.4, 3.8)
    caption: str = ""
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def png(self) -> bytes:
        """The content of a PNG file."""
        figure = new_figure(*self.size)
        self.draw(figure)
        return png(figure)

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
    found: Mapping[str, Mapping[str, Curve]],
    *,
    caption: str = "",
    columns: int = 3,
    most: int | None = None,
    steps: Sequence[int] | None = None,
    points: int = 40,
    **style: Any,
) -> Figure:
    """Returns a figure with a panel of curves, mean and standard error over seeds, for each title.

    Args:
        name: of its file.
        found: by the title of its panel, then by name, which gives the colour.
        caption: below the figure.
        columns: panels side by side.
        most: how many panels are drawn; all by default.
        steps: where the values are; 1, 2, ... by default.
        points: of how many steps, evenly, the JSON has numbers.
        style: `log`, `smooth`, `ordered`, `xlabel` and `ylabel` of `bands`; of all panels, or
            by title.
    """
    every = [curve for panel in found.values() for curve in panel.values()]
    shapes = [np.shape(one) for one in every if not isinstance(one, Mapping)]
    length = max((shape[1] for shape in shapes if len(shape) == 2), default=0)
    places = list(range(1, length + 1)) if steps is None else steps
    at = np.array(shown_steps(len(places), points), int) - 1
    shown = list(found)[:most]

    def draw(figure: Any) -> None:
        explained: list[list[str]] = []
        for axes, title in zip(panels(figure, len(shown), columns), shown, strict=True):
            labels: Any = {"legend": list(found[title]) not in explained, "title": title}
            explained.append(list(found[title]))
            for key, value in style.items():
                by_title = isinstance(value, Mapping) and value.keys() <= found.keys()
                if not by_title or title in value:
                    labels[key] = value[title] if by_title else value
            bands(axes, found[title], steps=places, **labels)

    def numbers(curve: Curve) -> dict[str, Any]:
        if isinstance(curve, Mapping):
            values = np.stack(list(curve.values()), axis=1)
        else:
            values = np.asarray(curve, float)
            values = values[:, at[at < values.shape[1]]] if values.ndim == 2 else values
        mean, error = mean_and_error(np.asarray(values, float))
        own = {"steps": list(curve)} if isinstance(curve, Mapping) else {}
        return {**own, "mean": mean.tolist(), "error": None if error is None else error.tolist()}

    data = {
        "steps": [places[i] for i in at],
        "curves": {
            title: {one: numbers(values) for one, values in panel.items()}
            for title, panel in found.items()
        },
    }
    more = len(found) - len(shown)
    caption += f" {more} more panels are in the JSON file." * (more > 0)
    return Figure(name, draw, grid_size(len(shown), 4.6, 3.4, columns), caption, data)


Part = Text | Equation | Table | Figure


@dataclasses.dataclass
class Report:
    """Tables, figures, equations and sentences, in their order.

    Attributes:
        title: a line.
        settings: what was asked for.
        data: numbers for the JSON that no table shows.
        parts: what is shown.
        details: the parts that are on the page and in the JSON only, by place.
    """

    title: str
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: list[Part] = dataclasses.field(default_factory=list)
    details: set[int] = dataclasses.field(default_factory=set)

    def add(self, part: Part, *, detail: bool = False) -> None:
        """Adds a part; a detail is not printed in the terminal."""
        if detail:
            self.details.add(len(self.parts))
        self.parts.append(part)

    def heading(self, text: str, below: str = "", *, detail: bool = True) -> None:
        """Adds a heading, and a paragraph below it."""
        self.add(Text(text, heading=True), detail=detail)
        if below:
            self.text(below, detail=detail)

    def text(self, text: str, *, code: bool = False, detail: bool = False) -> None:
        """Adds a paragraph, unless it is empty."""
        if text:
            self.add(Text(text, code), detail=detail)

    def table(
        self,
        title: str,
        rows: Sequence[Mapping[str, Cell]],
        strong: Sequence[int] = (),
        *,
        detail: bool = False,
    ) -> None:
        """Adds a table, unless it would be empty."""
        if rows:
            self.add(Table(title, rows, strong), detail=detail)

    def figure(
        self,
        name: str,
        draw: Callable[[Any], object],
        size: tuple[float, float] = (6.4, 3.8),
        caption: str = "",
        **data: Any,
    ) -> None:
        """Adds a figure; `data` are numbers for the JSON."""
        self.add(Figure(name, draw, size, caption, data))

    def show(self, console: Console | None = None) -> None:
        """Prints the report in the terminal."""
        console = Console() if console is None else console
        for i, part in enumerate(self.parts):
            if i not in self.details:
                part.print(console)

    def json(self) -> dict[str, Any]:
        """Returns the content of the JSON file."""
        head = {"format": FORMAT, "title": self.title, "settings": dict(self.settings)}
        return {**head, **self.data, "parts": [part.json() for part in self.parts]}

    def _repr_html_(self) -> str:
        """Returns the report for a notebook."""
        body = "\n".join(part.html() for part in self.parts)
        return f"<h1>{_escaped(self.title)}</h1>\n{body}"

    def save(self, folder: Path, name: str = "report") -> list[str]:
        """Writes NAME.json, NAME.html and a PNG of each figure; returns the names of the files."""
        names = [f"{name}.json", f"{name}.html"]
        write_json(folder / names[0], self.json())
        page = (
            f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
            f"<title>{_escaped(self.title)}</title>\n<style>{_STYLE}</style>\n"
            f"{self._repr_html_()}\n</html>\n"
        )
        write_bytes(folder / names[1], page.encode())
        for part in self.parts:
            if isinstance(part, Figure):
                names.append(f"{part.name}.png")
                write_bytes(folder / names[-1], part.png)
        return names

    def finish(self, folder: Path, name: str) -> None:
        """Shows and saves the report, and says which files were written."""
        self.show()
        tell(f"Wrote {', '.join(self.save(folder, name))} in {folder}.")


def tell(text: str) -> None:
    """Prints a line, however long, as it is."""
    Console().print(RichText(plain(text)), soft_wrap=True)


def _total(widths: Sequence[int]) -> int:
    """Returns the width of a table with columns so wide."""
    return 1 + sum(width + 3 for width in widths)


def _escaped(text: str) -> str:
    return html.escape(plain(text))


def _image(content: bytes, kind: str, what: str, style: str = "") -> str:
    data = base64.b64encode(content).decode()
    return f'<img class="{style}" alt="{_escaped(what)}" src="data:image/{kind};base64,{data}">'
