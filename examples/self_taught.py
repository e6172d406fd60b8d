"""An optimizer that trains optimizers: a learned rule trains a fresh copy of itself.

To `lopt.unroll` the weights of a rule are params like any others. Adam first meta-trains a small
rule on random quadratics. A fresh copy, from other weights and other seeds, is then trained for as
many outer steps by Adam, at the best of some rates, and by the trained rule. Draws a figure:

    python examples/self_taught.py self_taught.png
"""

import sys

import jax
import matplotlib
import numpy as np
import optax

import lopt

DIMENSION, HORIZON, TRUNCATION, PARTICLES = 10, 40, 10, 16
SIGMA, OUTER_STEPS, RATES = 0.01, 500, (0.003, 0.01, 0.03, 0.1)

RULE = lopt.small_mlp(hidden=(8,), step_multiplier=0.01)
INNER = lopt.InnerTraining(lopt.tasks.QuadraticFamily(DIMENSION), RULE, HORIZON)
META = lopt.Mean(lopt.PES(INNER, TRUNCATION, SIGMA), PARTICLES)


def meta_train(optimizer, key, steps=OUTER_STEPS):
    """Trains a fresh rule; returns its weights, and the meta-loss at each outer step."""
    init_key, run_key = jax.random.split(key)
    state = lopt.start(META, optimizer, RULE.init(init_key), run_key)
    state, losses = lopt.unroll(META, optimizer, state, steps)
    return state.params, losses


@jax.jit
def by_adam(rate, key):
    return meta_train(optax.adam(rate), key)


@jax.jit
def by_rule(theta, key):
    return meta_train(RULE.optimizer(theta), key)


def main(path: str | None = None) -> dict[str, np.ndarray]:
    """Returns the meta-loss of each outer step; draws the figure if there is a path for it."""
    first, second = jax.random.split(jax.random.key(0))

    def tuned(key):
        runs = [by_adam(rate, key) for rate in RATES]
        best = int(np.nanargmin([losses[-100:].mean() for _, losses in runs]))
        return RATES[best], *runs[best]

    rate, teacher, before = tuned(first)
    print(f"Adam at {rate} trains the rule: {before[:20].mean():.2f} -> {before[-100:].mean():.2f}")
    rate, _, adam = tuned(second)
    _, taught = by_rule(teacher, second)
    for name, losses in ((f"Adam at {rate}", adam), ("the rule", taught)):
        print(f"{name} trains a fresh copy: {losses[:20].mean():.2f} -> {losses[-100:].mean():.2f}")
    found = {"Adam": np.asarray(adam), "the learned rule": np.asarray(taught)}
    if path is None:
        return found
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, losses in found.items():
        means = np.convolve(losses, np.full(20, 1 / 20), "valid")
        axes.semilogy(np.arange(len(means)) + 20, means, label=f"trained by {name}")
    axes.set(xlabel="outer step", ylabel="meta-loss, mean of 20 steps")
    axes.set_title("A fresh rule, trained by Adam or by a rule that was trained")
    axes.legend()
    figure.savefig(path, dpi=120)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
