"""The wheel works without the repository: recipes, weights, training, plots."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
RELATIVE = re.compile(r"\]\((?!https?://)[^)]*\)")

TRAIN = """
import sys
import jax, optax, lopt
assert lopt.__file__.startswith(sys.prefix), lopt.__file__
task = lopt.tasks.mlp_classification(lopt.load_images("digits"), widths=(8,))
key = jax.random.key(0)
optimizer = lopt.pretrained("lopt-1", num_steps=10)
state = lopt.start(task, optimizer, task.init(key), key)
state, losses = lopt.unroll(task, optimizer, state, 10)
print(float(losses[0]), float(losses[-1]))
"""


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A new virtual environment with lopt as a wheel, and all else as it is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    pip, environment = [sys.executable, "-m", "pip", "--quiet"], dict(os.environ)
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, ROOT]
    run(*build, folder=folder, **environment)
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", folder=folder)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = folder.glob("lopt-*.whl")
    install = [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel]
    run(*install, folder=folder, **environment)
    # Files .pth in a folder that is itself named by one are not read: the repository stays out.
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_paths()["platlib"])
    return python


@pytest.mark.slow
def test_the_wheel_works_without_the_repository(installed, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    own = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "LOPT_CACHE_DIR": str(tmp_path)}
    lopt = installed.with_name("lopt")

    def lopt_says(*words: str | Path) -> str:
        return run(lopt, *words, folder=empty, **own)

    assert lopt_says("--version").split() == ["lopt", version("lopt")]
    assert "digits" in lopt_says("recipes")
    assert "lopt-1-symbolic" in lopt_says("pretrained")
    first, last = map(float, run(installed, "-c", TRAIN, folder=empty, **own).split())
    assert last < 0.9 * first

    recipe = shutil.copy(ROOT / "tests" / "experiment" / "tiny_recipe.py", tmp_path)
    settings = ["--set", "outer_steps=2", "--set", "evaluate=True"]
    lopt_says("train", recipe, "--run", "run", *settings)
    for name, start in {"curves.png": b"\x89PNG", "report.html": b"<!doctype html>"}.items():
        assert (empty / "run" / name).read_bytes()[: len(start)].lower() == start.lower(), name


@pytest.mark.slow
def test_the_wheel_has_types_and_a_readme_whose_links_work(installed):
    (packages,) = installed.parents[1].glob("lib/python*/site-packages")
    assert (packages / "lopt" / "py.typed").is_file()
    (metadata,) = packages.glob("lopt-*.dist-info/METADATA")
    assert "# lopt" in metadata.read_text()
    assert not RELATIVE.findall(metadata.read_text())


def test_links_of_the_readme_lead_to_the_repository_where_it_is_known():
    elsewhere = runpy.run_path(str(ROOT / "tools" / "readme.py"))["elsewhere"]
    text = (ROOT / "README.md").read_text()
    assert RELATIVE.findall(text)
    there = elsewhere(text, "https://example.org/lopt")
    assert not RELATIVE.findall(there)
    assert there.count("](") == text.count("](")
    assert "![Training loss of the learned rule" in there
    assert "](https://example.org/lopt/raw/HEAD/docs/images/curves.png)" in there
    assert "[LICENSE](https://example.org/lopt/blob/HEAD/LICENSE)" in there
    assert "see LICENSE." in elsewhere(text)


def test_the_citation_is_of_this_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(citation)
    assert citation["version"] == project["version"] == version("lopt")
    assert citation["license"] == project["license"]
    assert citation["keywords"] == project["keywords"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()
