"""An optimizer that trains optimizers: a learned rule trains a fresh copy of itself.

To `lopt.unroll` the weights of a rule are params like any others. Adam first meta-trains a small
rule on random quadratics. A fresh copy, from other weights and other seeds, is then trained for as
many outer steps by Adam and by the trained rule, with the best of as many rates, which for the rule
are multipliers of its updates. Draws a figure:

    python examples/self_taught.py self_taught.png
"""

import functools
import sys

import jax
import matplotlib
import numpy as np
import optax

import lopt

DIMENSION, SHORTEST, LONGEST, TRUNCATION, PARTICLES = 10, 20, 500, 10, 16
SIGMA, OUTER_STEPS = 0.01, 500
RATES, MULTIPLIERS = (0.01, 0.03, 0.1, 0.3), (0.03, 0.1, 0.3, 1.0)

RULE = lopt.small_mlp(hidden=(8,), step_multiplier=0.01)
INNER = lopt.InnerTraining(lopt.tasks.QuadraticFamily(DIMENSION), RULE, LONGEST)
LENGTHS = lopt.estimators.LogUniformHorizon(SHORTEST, LONGEST)
META = lopt.Mean(lopt.PES(INNER, TRUNCATION, SIGMA, schedule=LENGTHS), PARTICLES)


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
def by_rule(theta, multiplier, key):
    return meta_train(optax.chain(RULE.optimizer(theta), optax.scale(multiplier)), key)


def best_of(train, rates, key):
    """Returns the rate whose run ends lowest, with weights and meta-losses of that run."""
    runs = [train(rate, key) for rate in rates]
    best = int(np.nanargmin([losses[-100:].mean() for _, losses in runs]))
    return rates[best], *runs[best]


def main(path: str | None = None) -> dict[str, np.ndarray]:
    """Returns the meta-loss of each outer step; draws the figure if there is a path for it."""
    first, second = jax.random.split(jax.random.key(0))

    def say(what, losses):
        print(f"{what}: {losses[:20].mean():.3f} -> {losses[-100:].mean():.3f}")

    rate, teacher, before = best_of(by_adam, RATES, first)
    say(f"Adam at {rate} trains the rule", before)
    rate, _, adam = best_of(by_adam, RATES, second)
    say(f"Adam at {rate} trains a fresh copy", adam)
    rate, _, taught = best_of(functools.partial(by_rule, teacher), MULTIPLIERS, second)
    say(f"the rule, times {rate}, trains a fresh copy", taught)
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
