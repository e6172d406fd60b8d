"""Reports: one declaration, shown everywhere alike, and nothing a user wrote taken for markup."""

import dataclasses
import html
import inspect
import io
import itertools
import json
import math
import re
import sys
import types

import numpy as np
import pytest
from rich.console import Console

from lopt.experiment import cli
from lopt.experiment.probes.subject import subject
from lopt.experiment.report import (
    Measured,
    Report,
    bands,
    color_of,
    curves,
    measured,
    new_figure,
    number,
    progress,
    running_mean,
)
from lopt.experiment.report.statistics import plain
from lopt.experiment.settings import ProbeSettings

HOSTILE = "gradient[t-2] [red]no[/red] $x_ <b>&amp; \x1b[31mred\x1b]0;title\x07\r\x00"
CLEAN = "gradient[t-2] [red]no[/red] $x_ <b>&amp; red"


@pytest.fixture
def report():
    made = Report(HOSTILE, {"run": "x"}, {"more": [math.nan]})
    made.heading(HOSTILE, detail=False)
    made.text(HOSTILE)
    made.text("on the page only", detail=True)
    rows = [
        {HOSTILE: HOSTILE, "learning rate": 1e-3, "final loss": Measured(2.6528, 0.0635)},
        {HOSTILE: "b", "learning rate": None, "final loss": Measured(math.nan)},
    ]
    made.table(HOSTILE, rows, strong=[0])
    curves = {"learned": np.ones((2, 5)), HOSTILE.replace("\x00", ""): np.ones((1, 5))}
    made.figure("curve", lambda figure: bands(figure.add_subplot(), curves), caption=HOSTILE)
    return made


def printed(report, width):
    file = io.StringIO()
    report.show(Console(file=file, width=width))
    return file.getvalue()


def test_text_is_shown_as_it_is_everywhere(report, tmp_path):
    text = printed(report, 200)
    assert text.count(CLEAN) == 5
    assert "\x1b" not in text
    page = report._repr_html_()
    assert page.count(html.escape(CLEAN)) >= 6
    assert "\x1b" not in page
    assert report.save(tmp_path, "found") == ["found.json", "found.html", "curve.png"]
    assert (tmp_path / "curve.png").read_bytes() in [part.png for part in report.parts[-1:]]
    assert re.findall(r'(?:src|href)="(?!data:)', (tmp_path / "found.html").read_text()) == []


def test_json_holds_the_numbers_that_are_shown(report, tmp_path):
    report.save(tmp_path)
    content = json.loads((tmp_path / "report.json").read_text())
    (table,) = [part for part in content["parts"] if "table" in part]
    assert table["rows"][0]["final loss"] == {"mean": 2.6528, "error": 0.0635}
    assert table["rows"][1]["final loss"] == {"mean": None, "error": None}
    assert content["settings"] == {"run": "x"}
    assert content["more"] == [None]
    assert content["format"] == 2
    text = printed(report, 100)
    assert "2.653 ± 0.064" in text
    assert "NaN" in text
    assert "on the page only" not in text
    assert "on the page only" in report._repr_html_()


def test_neither_headings_nor_numbers_break_inside_of_words():
    made = Report("wide")
    names = [f"{kind} deviation of gradients" for kind in ("signed", "absolute", "normalised")]
    row = {"optimizer": "a name of several words that is long"}
    made.table("wide", [row | {name: Measured(1.23456, 0.0123) for name in names * 2}])
    text = printed(made, 60)
    for word in ("normalised", "deviation", "gradients", "optimizer", "1.235 ± 0.012", "several"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_table_too_wide_is_printed_in_parts_that_begin_with_its_first_column():
    made = Report("wide")
    names = [f"column{i:02}" for i in range(14)]
    made.table("wide", [{"optimizer": "Adam"} | dict.fromkeys(names, 1.25)])
    text = printed(made, 60)
    assert max(map(len, text.splitlines())) <= 60
    assert text.count("optimizer") == text.count("Adam") > 1
    assert [text.count(name) for name in names] == [1] * 14
    assert made.json()["parts"][0]["rows"] == [{"optimizer": "Adam"} | dict.fromkeys(names, 1.25)]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.0, "0"),
        (1.0, "1"),
        (0.001, "0.001"),
        (-0.25, "-0.25"),
        (1234.5678, "1235"),
        (123456.7, "123457"),
        (1e-5, "1.00e-05"),
        (2.5e7, "2.50e+07"),
        (12345, "12,345"),
        (True, "yes"),
        (None, "-"),
        (math.nan, "NaN"),
        (-math.inf, "-inf"),
    ],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("mean", "error", "text"),
    [
        (2.6528, 0.0635, "2.653 ± 0.064"),
        (123.4, 25.0, "123 ± 25"),
        (0.98, 0.0, "0.98 ± 0"),
        (1e-7, 2e-8, "1.00e-07 ± 2.0e-08"),
        (0.5, None, "0.5"),
        (None, None, "-"),
        (math.nan, math.nan, "NaN"),
    ],
)
def test_means_have_the_digits_of_their_error(mean, error, text):
    assert str(Measured(mean, error)) == text


def test_means_and_errors_over_seeds():
    found = measured([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3)
    assert found.error == pytest.approx(np.std([1, 2, 4], ddof=1) / 3**0.5)
    assert measured([3.0]) == Measured(3.0, None)
    assert measured([]) == Measured(None, None)


def test_running_means_look_back():
    values = np.array([[1.0, 2.0, 3.0, 4.0]])
    np.testing.assert_allclose(running_mean(values, 2), [[1, 1.5, 2.5, 3.5]])
    np.testing.assert_allclose(running_mean(values, 1), values)
    # Neither what is small after large values is lost, nor what follows a NaN.
    steep = np.array([[1e20, np.nan, 1.0, 3.0]])
    np.testing.assert_array_equal(running_mean(steep, 1), steep)
    np.testing.assert_array_equal(running_mean(steep, 2), [[1e20, np.nan, np.nan, 2.0]])


def test_a_log_axis_ends_above_what_underflowed():
    losses = np.exp(-np.arange(900.0))[None] * np.ones((3, 1))  # to 1e-308, and zero
    axes = bands(new_figure(4.0, 3.0).add_subplot(), {"learned": losses, "Adam": np.ones((3, 900))})
    low, high = axes.get_ylim()
    assert low == pytest.approx(1e-12, rel=1e-3)
    assert high < 100
    nothing = bands(new_figure(4.0, 3.0).add_subplot(), {"learned": np.zeros((2, 3))})
    assert nothing.get_yscale() == "linear"


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_tick_labels_do_not_overlap(scale):
    figure = new_figure(3.0, 2.2)
    axes = bands(figure.add_subplot(), {"learned": scale * np.geomspace(1e-9, 1, 50)[None]})
    figure.canvas.draw()
    for axis, ends in ((axes.yaxis, ("y0", "y1")), (axes.xaxis, ("x0", "x1"))):
        labels = [one for one in axis.get_majorticklabels() if one.get_text()]
        boxes = sorted(
            (getattr(box, ends[0]), getattr(box, ends[1]))
            for box in (label.get_window_extent() for label in labels)
        )
        assert len(boxes) >= 2
        assert all(a[1] < b[0] for a, b in itertools.pairwise(boxes))


def test_curves_have_levels_and_points_and_their_numbers():
    seeds = np.array([1.0, 3.0])
    panel = {"learned": np.ones((2, 90)), "Adam": seeds, "learned (kept)": {0: seeds, 200: seeds}}
    title = "a title as long as those of layers in a deep network are, ['layers'][17].weight"
    figure = curves("curves", {title: panel, "b": panel}, most=1, steps=range(90), points=10)
    numbers = figure.json()["curves"][title]
    assert figure.json()["steps"][:2] == [0, 10]
    assert len(numbers["learned"]["mean"]) == len(figure.json()["steps"]) == 10
    assert numbers["Adam"] == {"mean": 2.0, "error": 1.0}
    assert numbers["learned (kept)"] == {"steps": [0, 200], "mean": [2.0, 2.0], "error": [1.0, 1.0]}
    assert "1 more panels are in the JSON file." in figure.caption
    drawn = new_figure(*figure.size)
    figure.draw(drawn)
    (axes,) = drawn.axes
    assert "\n" in axes.get_title()
    line, level, dots = axes.get_lines()
    assert (level.get_linestyle(), dots.get_marker()) == ("--", "o")
    assert line.get_color() == dots.get_color()
    shades = bands(drawn.add_subplot(), {"Adam": np.ones((1, 3)), "SGD": seeds}, ordered=True)
    assert shades.get_lines()[0].get_color() != color_of("Adam")


def test_an_optimizer_has_one_color():
    assert color_of("Adam") == color_of("Adam") != color_of("learned")
    assert color_of("anything else").startswith("#")


def test_without_a_terminal_progress_is_a_plain_line_every_so_often(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("lopt.experiment.report.bars.monotonic", lambda: clock[0])
    with progress("training", 10) as at:
        for done, now in ((1, 1.0), (2, 31.0), (3, 32.0)):
            clock[0] = now
            at(done, "[red]loss[/red] 1")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "training 2/10 [red]loss[/red] 1\n"
    with progress("training", 10, show=False) as at:
        at(1, "nothing")
    assert capsys.readouterr() == ("", "")


def test_plain_text_keeps_its_lines():
    assert plain("a\n\tb\x1b[1m c") == "a\n\tb c"


@dataclasses.dataclass(frozen=True)
class WeightsSettings:
    """Measure how large weights are at the beginning.

    Attributes:
        seeds: how many times they are drawn.
    """

    seeds: int = 3

    def __post_init__(self):
        if self.seeds < 1:
            raise ValueError(f"--seeds {self.seeds} must be at least 1; try 3.")


def probe_weights(name, settings):
    """Returns how large the weights of a recipe, a run or a task are."""
    report = Report(f"The weights of {name}", {"name": name, **dataclasses.asdict(settings)})
    draws = [subject(name, ProbeSettings(seed=seed))[1] for seed in range(settings.seeds)]
    sizes = {which: np.abs([draw[which] for draw in draws]) for which in draws[0]}
    rows = [{"weight": which, "size": measured(values)} for which, values in sizes.items()]
    report.table(f"Weights of {name} ({settings.seeds} seeds)", rows)
    report.text("Sizes are absolute values.")
    drawn = {which: values[:, None] * np.ones(2) for which, values in sizes.items()}
    report.add(curves("weights", {"size": drawn}, "Absolute values.", xlabel="step"))
    return report


def test_a_probe_costs_few_lines(monkeypatch, tmp_path, capsys):
    lines = [inspect.getsource(one).splitlines() for one in (WeightsSettings, probe_weights)]
    assert sum(map(len, lines)) <= 40
    module = types.SimpleNamespace(probe_weights=probe_weights)
    monkeypatch.setitem(sys.modules, "lopt.experiment.probes.weights", module)
    command = cli._probe(WeightsSettings, "weights:probe_weights", "name", "weights")
    monkeypatch.setattr(cli, "COMMANDS", {**cli.COMMANDS, "probe weights": command})
    monkeypatch.setattr("lopt.experiment.runs.environment.prepare_jax", lambda: None)
    monkeypatch.setattr("sys.argv", ["lopt", "probe", "weights", "Beale", "--seeds", "2"])
    monkeypatch.chdir(tmp_path)
    cli.main()
    shown = capsys.readouterr().out
    assert "learning_rate" in shown
    assert "Wrote weights.json, weights.html, weights.png in probes/Beale/weights." in shown
    folder = tmp_path / "probes" / "Beale" / "weights"
    content = json.loads((folder / "weights.json").read_text())
    assert content["settings"] == {"name": "Beale", "seeds": 2}
    assert len(content["parts"][0]["rows"]) == 4
    assert set(content["parts"][2]["curves"]["size"]) >= {"learning_rate", "eps"}
    assert "Sizes are absolute values." in (folder / "weights.html").read_text()
    assert (folder / "weights.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("sys.argv", ["lopt", "probe", "weights", "Beale", "--seeds", "0"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "--seeds 0 must be at least 1" in capsys.readouterr().err
