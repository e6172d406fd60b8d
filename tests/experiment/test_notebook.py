"""What a notebook shows: a bar that moves, runs and reports as HTML, expressions as formulas."""

import warnings
from pathlib import Path

import pytest

from lopt.experiment.runs.run import Run
from lopt.symbolic import Variable, make_expression, to_latex

nbformat = pytest.importorskip("nbformat")
RECIPE = Path(__file__).with_name("tiny_recipe.py")
EXPRESSION = ("multiply", -0.5, ("tanh", Variable("m_corrected")))

CELLS = [
    f"""
from pathlib import Path
from lopt.experiment.report import Report
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.train import train
from lopt.symbolic import Variable, make_expression
run = Run.create(Path("run"), {str(RECIPE)!r}, ["outer_steps=10"])
run
""",
    "train(run); None",
    "run",
    """
report = Report("Found <b>")
report.table("Losses", [{"optimizer": "Adam", "loss": 0.25}])
report
""",
    "report.show()",
    f"make_expression({EXPRESSION!r})",
]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The outputs of each cell."""
    from nbclient import NotebookClient

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    where = {"metadata": {"path": tmp_path_factory.mktemp("notebook")}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what runs notebooks
        NotebookClient(book, timeout=300, resources=where, kernel_name="python3").execute()
    for cell in book.cells:  # progress is no error output, and nothing warns
        assert not [one for one in cell.outputs if one.output_type == "stream"], cell
    return [[one.data for one in cell.outputs] for cell in book.cells]


@pytest.mark.slow
def test_the_bar_ends_where_it_began(shown):
    (bar,) = shown[1]  # one output, in its place from the first step to the last
    assert "10/10" in bar["text/plain"]
    assert "meta-loss" in bar["text/html"]


def test_a_run_shows_how_far_it_is(shown):
    before, after = (outputs[-1]["text/html"] for outputs in (shown[0], shown[2]))
    assert "0 outer steps" in before
    assert "<img" not in before
    assert "10 outer steps" in after
    for part in ("<h1>Run run</h1>", "learning_rate", "0.05", "<img", "The meta-loss"):
        assert part in after


def test_reports_are_tables_and_no_markup(shown):
    (page,) = shown[3]
    assert "<h1>Found &lt;b&gt;</h1>" in page["text/html"]
    assert '<td class="text">Adam</td>' in page["text/html"]
    assert all("Adam" in part for part in (shown[4][0]["text/plain"], shown[4][0]["text/html"]))


def test_an_expression_is_a_formula(shown):
    (formula,) = shown[5]
    assert formula["text/latex"] == f"${to_latex(make_expression(EXPRESSION))}$"
    assert r"\tanh" in formula["text/latex"]
    assert "Expression" in formula["text/plain"]


def test_to_show_a_run_executes_nothing_of_it(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE.read_text())
    run = Run.create(tmp_path / "run", str(recipe), ["outer_steps=4"])
    recipe.write_text("raise RuntimeError")
    (run.folder / "recipe.py").write_text("raise RuntimeError")
    assert "outer_steps" in Run(run.folder)._repr_html_()
