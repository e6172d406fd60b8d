"""Examples run as a user runs them: in a process of their own, with JAX as it comes."""

import contextlib
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# Runs an example's main and prints what it returns.
CALL = """
import json, runpy, sys
import numpy as np
results = runpy.run_path(sys.argv[1])["main"](*sys.argv[2:])
print(json.dumps({name: np.asarray(value).tolist() for name, value in results.items()}))
"""


def run(*arguments: str | Path, **environment: str) -> str:
    """Runs Python, warnings as errors, with a compilation cache; returns what it prints."""
    own = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".pytest_cache" / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    command = [sys.executable, "-W", "error", *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | own | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def returned(name: str, *arguments: str | Path, **environment: str) -> dict[str, np.ndarray]:
    printed = run("-c", CALL, ROOT / "examples" / f"{name}.py", *arguments, **environment)
    results = json.loads(printed.splitlines()[-1])
    return {name: np.asarray(value) for name, value in results.items()}


def tutorial(data: str, **environment: str) -> dict[str, np.ndarray]:
    return returned("tutorial", data, **environment)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 100


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(path):
    if path.stem not in (
        "tutorial",
        "variance_crossover",
        "self_taught",
    ):  # they have tests of their own
        run(path)


@pytest.mark.slow
def test_variances_cross_and_the_mix_follows_the_lower(tmp_path):
    found = returned("variance_crossover", tmp_path / "figure.png")
    es, other, mix, best = (values for name, values in found.items() if name != "frequencies")
    assert (other[:10] < 0.01 * es[:10]).all()
    assert es[-1] < 0.1 * other[-1]
    # The two see the same pairs; where that makes them agree in their errors, the mix of both is
    # up to a quarter worse than the better one alone.
    assert (mix < 1.4 * np.minimum(es, other)).all()
    # A sample variance of n gradients is off by (2 / n)^(1/2) of itself, here 0.032. Where tails
    # are heavy, the covariance of 128 pairs is a guess: 1.3 at one frequency, 1.1 with 512 pairs.
    assert (best < 1.13 * np.minimum(es, other)).sum() >= 39
    assert (best < 1.4 * np.minimum(es, other)).all()
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_rule_trains_a_fresh_copy_of_itself(tmp_path):
    for losses in returned("self_taught", tmp_path / "figure.png").values():
        assert losses.shape == (500,)
        assert losses[-100:].mean() < 0.7 * losses[:20].mean()
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.slow
def test_tutorial_on_digits():
    found = tutorial("digits")
    for name in ("sgd", "own"):
        assert found[name].shape == (1000,)
        assert abs(found[name][0] - 2.3) < 0.2
        assert found[name][-100:].mean() < 0.2
    assert found["own"][-100:].mean() < found["sgd"][-100:].mean()
    assert found["slope"] < 0  # a larger rate would help
    assert found["meta"][-500:].mean() < 0.6 * found["meta"][:20].mean()
    assert abs(found["rates"][0] - 1e-3) < 1e-6
    assert found["rates"][-1] > 0.03


@pytest.mark.slow
def test_tutorial_gives_the_published_figures_on_fashion_mnist(data_folder):
    found = tutorial("fashion_mnist", LOPT_DATA_DIR=str(data_folder))
    assert abs(found["sgd"][0] - 2.34) < 0.12
    assert abs(found["sgd"][-100:].mean() - 0.6) < 0.12
    assert abs(found["slope"] + 0.0405) < 0.015
    assert abs(found["meta"][:20].mean() - 2.25) < 0.05
    assert abs(found["meta"][-500:].mean() - 1.23) < 0.03
    assert abs(found["rates"][0] - 1e-3) < 1e-6
    assert abs(found["rates"][-500:].mean() - 0.055) < 0.01


BOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def test_notebooks_have_no_outputs():
    assert {path.stem for path in BOOKS} == {"use_pretrained", "meta_train", "distil"}
    for path in BOOKS:
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs")
            assert cell.get("execution_count") is None


def printed_numbers(path: Path, folder: Path) -> dict[str, list[float]]:
    """Executes a notebook as it comes; returns the numbers after what its lines begin with."""
    nbformat = pytest.importorskip("nbformat")
    from nbclient import NotebookClient

    book = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": folder}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what runs notebooks
        NotebookClient(book, timeout=900, resources=where, kernel_name="python3").execute()
    outputs = [one for cell in book.cells for one in cell.get("outputs", ())]
    assert not [one for one in outputs if one.get("name") == "stderr"]
    lines = "".join(one["text"] for one in outputs if one.output_type == "stream").splitlines()
    found = {}
    for line in lines:
        words = re.split(r"\s{2,}|:\s+", line)
        with contextlib.suppress(ValueError):
            found[words[0]] = [float(word) for word in words[1:]]
    return found


@pytest.mark.slow
def test_the_notebook_on_a_pretrained_optimizer(tmp_path):
    found = printed_numbers(ROOT / "examples" / "use_pretrained.ipynb", tmp_path)
    adam = [numbers[0] for name, numbers in found.items() if name.startswith("Adam")]
    assert len(adam) == 2
    for name in ("lopt-1", "lopt-1-symbolic"):
        assert found[name][0] < min(adam)
        assert found[name][1] > 0.9


@pytest.mark.slow
def test_the_notebook_on_meta_training(tmp_path):
    found = printed_numbers(ROOT / "examples" / "meta_train.ipynb", tmp_path)
    adam = [numbers[0] for name, numbers in found.items() if name.startswith("Adam")]
    after = found["the rule after meta-training"][0]
    assert len(adam) == 2
    assert after < 0.8 * min(*found["the rule before meta-training (Muon)"], *adam)


@pytest.mark.slow
def test_the_notebook_on_distilling(tmp_path):
    found = printed_numbers(ROOT / "examples" / "distil.ipynb", tmp_path)
    assert found["the equation"][0] < 1.2 * found["the network"][0]
