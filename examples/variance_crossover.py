"""Which meta-gradient is less noisy: differentiate, or perturb and compare?

The meta-loss is theta^2 / 2 + sin(w theta) / 5. Where it is smooth (small w), differentiating at a
perturbed theta (reparameterisation) has the lower variance; where it is rough, evolution strategies
have. Mixed by inverse variance (Metz et al. 2019, arXiv:1810.10180) the two are about as good as
the better one, whichever that is, and better where their errors cancel. Where their errors are
alike the mix is a little worse than the better one, unless it takes their covariance into account.
Draws a figure:

    python examples/variance_crossover.py variance_crossover.png
"""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import lopt

THETA, SIGMA, NUM, REPEATS = 1.0, 0.1, 128, 2_000


class Surface(lopt.AbstractTask):
    """The meta-loss as the loss of a task with one parameter, which starts at zero."""

    frequency: jax.Array

    def init(self, key):
        return jnp.zeros(())

    def batch(self, key, split="train"):
        return ()

    def loss(self, params, batch):
        return params**2 / 2 + jnp.sin(self.frequency * params) / 5


class Jump(lopt.AbstractLearnedOptimizer):
    """Moves the parameter to theta in one step; two steps then have the mean loss L(theta) / 2."""

    def init(self, key):
        return jnp.full((), THETA)

    def begin(self, theta, params, num_steps=None):
        return ()

    def update(self, theta, grads, state, params=None, *, value=None, **extra):
        return theta - params, state


@eqx.filter_jit
@eqx.filter_vmap(in_axes=(0, None))
def variances(frequency, key):
    """Returns the variance of each outer step's gradient: ES, reparameterisation, their mixes."""
    inner = lopt.InnerTraining(Surface(frequency), Jump(), horizon=2)
    one = lopt.ES(inner, SIGMA)
    other = lopt.Reparameterized(lopt.MetaTask(inner), SIGMA)
    mix = lopt.InverseVariance(one, other, NUM)
    best = lopt.InverseVariance(one, other, NUM, covariance=True)
    keys, theta = jax.random.split(key, REPEATS), jnp.full((), THETA)

    def variance(estimator):
        state = estimator.prepare(theta, key)
        return jax.vmap(lambda k: estimator.estimate(theta, state, k)[0].grads)(keys).var()

    return [variance(e) for e in (lopt.Mean(one, NUM), lopt.Mean(other, NUM), mix, best)]


def main(path: str | None = None) -> dict[str, np.ndarray]:
    """Returns frequencies and variances; draws the figure if there is a path for it."""
    frequencies = jnp.geomspace(0.5, 100, 40)
    results = [np.asarray(v) for v in variances(frequencies, jax.random.key(0))]
    names = (
        "evolution strategies",
        "reparameterisation",
        "mixed by inverse variance",
        "mixed with covariance",
    )
    found = dict(zip(names, results, strict=True)) | {"frequencies": np.asarray(frequencies)}
    if path is None:
        return found
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, style in zip(names, ("-", "-", "k--", "k:"), strict=True):
        axes.loglog(frequencies, found[name], style, label=name)
    axes.set(xlabel="frequency w of the meta-loss", ylabel="variance of the meta-gradient")
    axes.set_title(f"theta²/2 + sin(w theta)/5, sigma = {SIGMA}, {NUM} antithetic pairs")
    axes.legend()
    figure.savefig(path, dpi=120)
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
