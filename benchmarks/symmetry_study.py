r"""The published study of broken symmetries (Sobotka et al. 2024, arXiv:2312.07174), done again.

Meta-trains the learned optimizer of the recipe `l2o` on networks of 20 units with four activations
and three seeds each, watches every one with `lopt probe symmetry`, and draws how far updates leave
the constraints in meta-testing and in meta-training, with bands over the seeds. What is there
already is not done again, whatever its settings were. An hour on two cores at 8x8; at the published
size and length, about as long for each of the twelve on one core, which `outer_steps` shortens.
Panels may be chosen, and their seeds: of plain ReLU, as below, three with which units do not die.

    python benchmarks/symmetry_study.py runs/study study.png
    python benchmarks/symmetry_study.py runs/28 study.png size=28 outer_steps=10000 \
        sigmoid:translation relu:rescale:1,3,5 leaky_relu:rescale batch_norm:scale
"""

import json
import subprocess
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import numpy as np
from common import show
from matplotlib import pyplot

# A network, by its activation, and the symmetry that is drawn of it.
PANELS = ("sigmoid:translation", "relu:rescale", "leaky_relu:rescale", "batch_norm:scale")
SEEDS = "0,1,2"
OUTER_STEPS_AGAIN = 200
NAMES = {"learned": "L2O", "SGD": "SGD", "momentum": "momentum", "Adam": "Adam", "Lion": "Lion"}
COLORS = dict(zip(NAMES, ("#d62728", "#7f7f7f", "#2ca02c", "#1f77b4", "#9467bd"), strict=True))


def lopt(*words: object) -> None:
    """Runs a command of lopt's."""
    command = "import sys; from lopt.experiment.cli import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", command, *map(str, words)], check=True)


def probed(folder: Path, activation: str, seed: int, more: list[str]) -> dict:
    """Returns what `lopt probe symmetry` writes, after training and probing if need be."""
    run = folder / f"{activation}-{seed}"
    if not (run / "report.json").exists():
        pairs = (f"activation={activation}", f"seed={seed}", *more)
        settings = [word for pair in pairs for word in ("--set", pair)]
        started = (run / "run.json").exists()
        lopt("train", *(("--resume", run) if started else ("l2o", *settings, "--run", run)))
    out = run / "symmetry"
    if not (out / "symmetry.json").exists():
        lopt("probe", "symmetry", run, "--outer-steps", OUTER_STEPS_AGAIN, "--out", out)
    report = json.loads((run / "report.json").read_text())
    return json.loads((out / "symmetry.json").read_text()) | {"outer_steps": report["outer_steps"]}


def parts_of(numbers: dict, word: str) -> dict[str, dict]:
    """Returns the tables or figures of a report, by title or file."""
    return {part[word]: part for part in numbers["parts"] if word in part}


def panel(numbers: dict, kind: str, *figures: str) -> tuple[list[int], dict]:
    """Returns steps and curves of |signed sums| of the first symmetry of a kind, as published."""
    found = parts_of(numbers, "figure")
    for figure in (found[f"{name}.png"] for name in figures if f"{name}.png" in found):
        for title, lines in figure["curves"].items():
            if title.startswith(f"{kind} of ") and title.endswith(": signed"):
                return figure["steps"], lines
    raise KeyError(f"{numbers['settings']['run']} has no symmetry of the kind {kind}.")


def curves(each: list[dict], kind: str, name: str) -> tuple[list[int], np.ndarray]:
    """Returns steps, and a curve for each meta-training."""
    found = [panel(numbers, kind, "deviations", "nearly") for numbers in each]
    return found[0][0], np.asarray([lines[name]["mean"] for _, lines in found])


def cosine(numbers: dict, kind: str, name: str) -> float:
    """Returns the mean cosine of an optimizer's updates."""
    tables = parts_of(numbers, "table")
    table = next(one for title, one in tables.items() if title.startswith(f"{kind} of "))
    row = next(row for row in table["rows"] if row["optimizer"] == name)
    return row["normalised"]["mean"]


def band(axes: object, steps: list[int], values: np.ndarray, name: str, **style: object) -> None:
    """Draws the mean over seeds, and a deviation about it."""
    mean, spread = values.mean(axis=0), values.std(axis=0)
    axes.plot(steps, mean, color=COLORS[name], label=NAMES[name], **style)
    low = np.maximum(mean - spread, values.min(axis=0))
    axes.fill_between(steps, low, mean + spread, color=COLORS[name], alpha=0.2, lw=0)


def main(folder: str = "runs/study", path: str | None = None, *words: str) -> None:
    """Does what is missing, prints the table, and draws the figure if there is a path for it.

    Words are settings of the recipe, `name=value`, and panels, `activation:symmetry`, or
    `activation:symmetry:seed,seed`.
    """
    more = [word for word in words if "=" in word]
    chosen = [word for word in words if "=" not in word] or PANELS
    panels = [(*word.split(":"), SEEDS)[:3] for word in chosen]
    found = {
        activation: [probed(Path(folder), activation, int(s), more) for s in seeds.split(",")]
        for activation, _, seeds in panels
    }
    rows = []
    for activation, each in found.items():
        kinds = {title.partition(" of ")[0] for title in parts_of(each[0], "table")}
        for kind in (k for k in ("translation", "rescale", "scale") if k in kinds):
            for name in NAMES:
                steps, values = curves(each, kind, name)
                places = [int(np.argmin(np.abs(np.asarray(steps) - at))) for at in (10, 100)]
                cells = [f"{values[:, i].mean():.2g} ± {values[:, i].std():.1g}" for i in places]
                mean = np.mean([cosine(numbers, kind, name) for numbers in each])
                rows.append([activation, kind, NAMES[name], *cells, f"{mean:.2g}"])
    headings = ["network", "symmetry", "", "|signed| at 10", "at 100", "mean cosine"]
    show("Deviations of updates, mean and spread over seeds", headings, rows)
    if path is not None:
        draw(found, panels, Path(path))


def draw(found: dict[str, list[dict]], shown: list[tuple[str, ...]], path: Path) -> None:
    """Draws a column for each network and symmetry: meta-testing above, meta-training below."""
    size = (3.75 * len(shown), 6.4)
    figure, panels = pyplot.subplots(
        2, len(shown), squeeze=False, figsize=size, layout="constrained"
    )
    for column, (activation, kind, _) in zip(panels.T, shown, strict=True):
        each, (above, below) = found[activation], column
        for name in NAMES:
            band(above, *curves(each, kind, name), name)
        lengths = sorted({numbers["outer_steps"] for numbers in each})
        trained = " to ".join(f"{length:,}" for length in lengths)
        network = activation.replace("_", " ")
        above.set(title=f"{kind}, {network} ({trained} outer steps)", xlabel="inner step")
        lines = [panel(numbers, kind, "meta_training")[1] for numbers in each]
        again = np.asarray([one["learned"]["mean"] for one in lines])
        band(below, panel(each[0], kind, "meta_training")[0], again, "learned")
        kept = [one["learned (kept)"] for one in lines]
        kept = [dict(zip(one["steps"], one["mean"], strict=True)) for one in kept]
        stages = sorted(set.intersection(*map(set, kept)))
        levels = np.asarray([[one[stage] for stage in stages] for one in kept])
        middle, spread = levels.mean(axis=0), levels.std(axis=0)
        style = {"color": COLORS["learned"], "capsize": 3, "label": "L2O, kept weights"}
        down = np.minimum(spread, middle - levels.min(axis=0))
        below.errorbar(stages, middle, (down, spread), fmt="o", mec="black", **style)
        for name in ("SGD", "momentum", "Adam", "Lion"):
            level = np.mean([one[name]["mean"] for one in lines])
            below.axhline(level, color=COLORS[name], ls="--", label=NAMES[name])
        short = min(20, each[0]["settings"]["steps"])
        below.set(xlabel="outer step", title=f"first {short} steps, during meta-training")
        below.set_xscale("symlog", linthresh=1, linscale=0.3)
        below.set_xlim(-0.3, 2 * stages[-1])
        for axes in column:
            axes.set(yscale="log")
            axes.grid(alpha=0.25, lw=0.5)
    panels[0, 0].set(ylabel="|sum over units of <u, xi>|")
    panels[1, 0].set(ylabel="mean over the first steps")
    for row in panels:
        row[0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
