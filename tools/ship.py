"""Makes weights what `lopt.pretrained` gives under a name, with a card: for maintainers.

    lopt evaluate runs/lopt-1 --suite standard --out runs/lopt-1-judged
    python tools/ship.py lopt-1 runs/lopt-1 --evaluation runs/lopt-1-judged --verdict "..."

Both files go into src/lopt/weights, to be committed.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from lopt.experiment.runs import storage
from lopt.experiment.runs.files import digest, read_json, write_json
from lopt.experiment.runs.registry import load_recipe
from lopt.experiment.runs.run import Run
from lopt.experiment.settings import help_of

# Of the tables of an evaluation, those over all tasks go on the card.
TABLES = ("All ", "Against ")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is shipped, and what its card says beside what a run's folder knows."""

    name: tyro.conf.Positional[str]  # as users will give it, such as lopt-1.
    weights: tyro.conf.Positional[Path]  # the folder of a run, or a file of `lopt.save`.
    verdict: str  # a sentence: what it is better and worse than, on which tasks.
    evaluation: Path | None = None  # the folder of a report of `lopt evaluate`.
    trained_on: str = ""  # in words; by default what the recipe says of itself.
    hours: float | None = None  # of meta-training; by default those of the run's own log.
    licence: str = "Apache-2.0"  # of the weights.


def ship(settings: Settings) -> Path:
    """Writes weights and card; returns the file of the weights."""
    learned, theta = storage.load(settings.weights)
    path = storage.PRETRAINED / f"{settings.name}.safetensors"
    storage.save(path, learned, theta)
    like = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    state = jax.eval_shape(lambda params: learned.begin(theta, params, 1000), like)
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    card: dict[str, Any] = {
        "rule": type(learned).__name__,
        "weights": sum(leaf.size for leaf in jax.tree.leaves(theta)),
        "state bytes per param": round(state_bytes / like.size, 1),
        "verdict": settings.verdict,
        "trained on": settings.trained_on,
        "largest params": None,
        "longest horizon": None,
        "hours": settings.hours,
    }
    if (settings.weights / "run.json").exists():
        card |= of_run(Run(settings.weights), settings)
    if settings.evaluation is not None:
        parts = read_json(settings.evaluation / "report.json")["parts"]
        card["evaluation"] = [one for one in parts if one.get("table", "").startswith(TABLES)]
    card |= {"licence": settings.licence, "sha256": digest(path)}
    write_json(path.with_suffix(".json"), {"evaluation": []} | card)
    return path


def of_run(run: Run, settings: Settings) -> dict[str, Any]:
    """Returns what a run's folder knows: what was trained on, how long, and how large."""
    recipe, given, seconds = run.config["recipe"], run.config["settings"], run.log["seconds"]
    params = [
        jax.eval_shape(lambda key, one=one: one.draw(key).init(key), jax.random.key(0))
        for one in run.inner.tasks.architectures()
    ]
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(one)) for one in params]
    hours = float(np.nansum(seconds)) / 3600 if settings.hours is None else settings.hours
    return {
        "trained on": settings.trained_on or " ".join(help_of(load_recipe(recipe))[0].split()),
        "largest params": max(sizes),
        "longest horizon": run.inner.horizon,
        "hours": round(hours, 2),
        "outer steps": len(seconds),
        "recipe": Path(recipe).name,
        # Files are named, wherever they were.
        "settings": {k: Path(v).name if isinstance(v, str) else v for k, v in given.items()},
        "made with": run.config["made_with"],
    }


if __name__ == "__main__":
    print(f"Wrote {ship(tyro.cli(Settings))} and its card.")
