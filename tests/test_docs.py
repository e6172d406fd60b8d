"""What README.md and docs/ say is true: their Python runs, their links and commands work."""

import dataclasses
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lopt
from lopt.experiment.cli import COMMANDS
from lopt.experiment.runs.registry import build, recipe_names
from lopt.experiment.settings import help_of
from lopt.tasks import taskset

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [page.stem for page in PAGES]
# Their Python is checked by hand (make slow): minutes, nearly all of them to compile.
LONG = ("concepts", "estimators", "experiments", "extending", "horizon", "optax")
LONG += ("symbolic", "symmetry", "tasks", "torch", "tutorial")
WORDS = {word for name in COMMANDS for word in name.split()[:1]} | {"--help"}

# A tiny run of the recipe digits.
TINY_RUN = """
from pathlib import Path
from lopt.experiment.runs.environment import use_compilation_cache
from lopt.experiment.runs.run import Run
from lopt.experiment.runs.train import train
use_compilation_cache()
folder = Path("runs/digits")
settings = ("outer_steps=2", "horizon=4", "truncation=2", "particles=2")
train(Run.create(folder, "digits", settings), show_progress=False)
"""


def python_of(page: Path) -> str:
    """Returns the Python of a page, every line of it at its place, so that tracebacks fit."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines)


def commands_of(page: Path) -> list[list[str]]:
    """Returns the lopt commands of a page, as lists of words."""
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", page.read_text(), re.DOTALL | re.M)
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("lopt ")]


def execute(script: str, folder: Path) -> None:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "LOPT_CACHE_DIR": str(folder),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        "XLA_FLAGS": os.environ["XLA_FLAGS"],
    }
    path = folder / "page.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, "-W", "error", path],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny_run")
    execute(TINY_RUN, folder)
    return folder / "runs"


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in LONG)) for p in PAGES],
    ids=IDS,
)
def test_python_runs(page, request, tmp_path):
    script = python_of(page)
    if not script.strip():
        return
    if "runs/digits" in script:
        shutil.copytree(request.getfixturevalue("tiny_run"), tmp_path / "runs")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    execute(script, tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_name_recipes_and_their_fields(page):
    for words in commands_of(page):
        assert words[1] in WORDS, words
        settings = [after for word, after in itertools.pairwise(words) if word == "--set"]
        if words[1] == "train" and words[2] in recipe_names():
            build(words[2], settings)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", page.read_text()):
        if "://" not in target and not target.startswith("#"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_readme_names_the_targets_of_the_makefile():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"`make ([a-z]+)", (ROOT / "README.md").read_text()):
        assert target in targets, target


def test_the_gallery_has_every_picture():
    shown = re.findall(r"\(images/([^)]+)\)", (ROOT / "docs" / "gallery.md").read_text())
    there = [path.name for path in (ROOT / "docs" / "images").iterdir()]
    assert sorted(shown) == sorted(there)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The documentation, built without a warning."""
    pytest.importorskip("myst_parser")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "-q", ROOT / "docs", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_site_documents_every_public_name(site):
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="").data
    found = {name for kind in inventory if kind.startswith("py:") for name in inventory[kind]}
    wings = [lopt.core, lopt.tasks, lopt.learned, lopt.estimators, lopt.symbolic, lopt.analysis]
    for module in (*wings, taskset, lopt.analysis.dynamics, lopt.analysis.symmetry):
        public = [name for name in module.__all__ if callable(getattr(module, name))]
        assert public
        assert not [name for name in public if f"{module.__name__}.{name}" not in found]
    face = {name for name in lopt.__all__ if callable(getattr(lopt, name))}
    assert face <= {name.rpartition(".")[2] for name in found}


@pytest.mark.slow
def test_the_site_has_a_page_for_every_command_and_links_to_it(site):
    for name, command in COMMANDS.items():
        page = (site / "commands" / f"{name.replace(' ', '-')}.html").read_text()
        about, _ = help_of(command.settings)
        assert about.partition("\n")[0].replace("'", "\N{RIGHT SINGLE QUOTATION MARK}") in page
        assert page.count("<tr") >= len(dataclasses.fields(command.settings)) - 2  # hidden ones
    page = (site / "experiments.html").read_text()
    assert re.search(r'href="commands/recipes.html"><code[^>]*><span class="pre">lopt<', page)
    page = (site / "estimators.html").read_text()
    assert re.search(r'href="api/estimators.html#lopt.estimators.PES"><code', page)
    assert "_modules/lopt/estimators" in (site / "api" / "estimators.html").read_text()
