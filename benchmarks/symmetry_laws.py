"""What becomes of conserved quantities: a run, the exact laws, and the published closed forms.

A digits MLP with 20 ReLU units is trained by SGD with weight decay, without and with momentum, in
64 bits. Prints how far both kinds of laws are off, and draws them beside the run (Kunin et al.,
2021, arXiv:2012.04728). A quarter of a minute:

    python benchmarks/symmetry_laws.py docs/images/symmetry_laws.png
"""

import sys

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("agg")

import numpy as np
from common import show
from matplotlib import pyplot

import lopt
from lopt.analysis.symmetry import (
    HeavyBall,
    LedgerProbe,
    continuous_law,
    exact_law,
    regime,
    symmetries,
)

STEPS, LEARNING_RATE, WEIGHT_DECAY = 500, 0.1, 5e-3


def main(path: str | None = None) -> None:
    """Prints the errors, and draws the figure if there is a path for it."""
    jax.config.update("jax_enable_x64", True)
    key = jax.random.key(0)
    images = lopt.load_images("digits")
    task = lopt.tasks.mlp_classification(images, (20,), batch_size=128)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), task.init(key))
    generators = symmetries(task, key, params=params).generators
    figure, panels = pyplot.subplots(2, 2, figsize=(9, 6), layout="constrained", sharex=True)
    rows = []
    for column, momentum in zip(panels.T, (0.0, 0.9), strict=True):
        ball = HeavyBall(LEARNING_RATE, WEIGHT_DECAY, momentum)
        optimizer = ball.optimizer()
        state = lopt.start(task, optimizer, params, key)
        _, ledgers = lopt.unroll(task, optimizer, state, STEPS, record=LedgerProbe(generators))
        for axes, generator in zip(column, generators, strict=True):
            ledger = ledgers[generator.name]
            measured = np.asarray(ledger.conserved)
            exact = np.asarray(exact_law(generator, ball, ledger))
            closed = np.asarray(continuous_law(generator, ball, ledger))
            scale = np.abs(measured).max()
            changed = np.abs(measured[-1] - measured[0])
            off = [float((np.abs(law - measured) / scale).max()) for law in (exact, closed)]
            share = float(np.median(np.abs(closed - measured)[-1] / changed))
            kind, how = generator.kind, regime(generator, ball)
            errors = [f"{one:.1e}" for one in (*off, share)]
            rows.append([kind, f"{momentum:g}", how, *errors])
            # The unit that changes most tells the lines apart best.
            unit = int(np.argmax(changed))
            steps = np.arange(STEPS)
            axes.plot(steps[::20], measured[::20, unit], "k.", label="the run")
            axes.plot(steps, exact[:, unit], color="#1f77b4", label="exact law")
            axes.plot(steps, closed[:, unit], "--", color="#d62728", label="closed form")
            axes.set(title=f"{kind}, momentum {momentum:g}: {how}")
            axes.grid(alpha=0.25, lw=0.5)
    panels[0, 0].legend(fontsize=8, frameon=False)
    for axes in panels[-1]:
        axes.set(xlabel="step")
    for axes in panels[:, 0]:
        axes.set(ylabel="conserved by gradient flow")
    headings = ["symmetry", "momentum", "regime", "exact law off by", "closed form off by"]
    title = f"Largest error over {STEPS} steps and all units, as a share of the largest"
    show(title, [*headings, "at the end, of its change"], rows)
    if path is not None:
        figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])
