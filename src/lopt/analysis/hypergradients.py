"""Hypergradients: the derivative of a meta-loss in each weight of theta, and whether to trust it.

Forward mode over the whole run is exact for k hyperparameters in one pass, in memory that does not
grow with the run's length (Franceschi et al. 2017, arXiv:1703.01785). A derivative can be exactly
zero where the loss does react, behind a sign for one, or be no number. Here each is held against
central differences, and those that will not do are named.
"""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lopt.core.checks import check_positive
from lopt.core.inner import InnerTraining
from lopt.core.types import Key, Scalar, Theta

Verdict = Literal["fine", "zero", "unused", "undefined", "in doubt", "unchecked"]

_MEANINGS: dict[Verdict, str] = {
    "zero": "the derivative is exactly zero although the loss reacts: the way to it leads through "
    "a sign, a rounding or a branch",
    "unused": "the derivative is exactly zero, and the loss is the same at theta - sigma and theta "
    "+ sigma: this run has no use for it, unless a larger sigma shows one",
    "undefined": "the derivative is no number",
    "in doubt": "derivative and difference disagree: a kink, chaos, or too little precision",
    "unchecked": "the difference is lost in the rounding of losses, so that nothing is known of "
    'the derivative; try jax.config.update("jax_enable_x64", True)',
}


class Slope(eqx.Module):
    """What is known of one array of theta.

    Attributes:
        name: its path in theta.
        size: its number of weights.
        derivative: of the meta-loss, along the gradient if there are several weights.
        difference: the same from central differences, with steps of 1e-4 at most: of a
            hyperparameter that is learned by its logarithm, a ten-thousandth of its value.
        reaction: the difference in loss between theta + sigma and theta - sigma.
        zeros, undefined: how many weights have such a derivative.
        verdict: "fine", "zero" where the loss does react, "unused" where it does not, "undefined",
            "in doubt" where derivative and difference disagree, or "unchecked" where rounding
            leaves the difference no say.
    """

    name: str
    size: int
    derivative: float
    difference: float
    reaction: float
    zeros: int
    undefined: int
    verdict: Verdict


class Hypergradients(eqx.Module):
    """The result of `hypergradients`.

    Attributes:
        meta_loss: at theta.
        grads: its derivatives, like theta.
        slopes: of each array of theta, checked.
        sigma: how far theta was moved to see whether the loss reacts at all.
    """

    meta_loss: Scalar
    grads: Theta
    slopes: tuple[Slope, ...]
    sigma: float

    def report(self) -> str:
        """Returns a table, and a sentence on each derivative that will not do."""
        width = max(len(slope.name) for slope in self.slopes)
        lines = [f"{'theta':{width}}  weights   derivative   difference  verdict"]
        lines += [
            f"{s.name:{width}}  {s.size:7}  {s.derivative:11.4e}  {s.difference:11.4e}  {s.verdict}"
            for s in self.slopes
        ]
        lines += [
            f"{s.name}: {_MEANINGS[s.verdict]}." for s in self.slopes if s.verdict in _MEANINGS
        ]
        if any(s.verdict in ("zero", "undefined", "in doubt") for s in self.slopes):
            lines.append(
                f"An estimate that needs no derivative: lopt.ES(inner, sigma={self.sigma:g})."
            )
        return "\n".join(lines)


def hypergradients(
    inner: InnerTraining,
    theta: Theta,
    key: Key,
    mode: Literal["forward", "reverse"] = "forward",
    sigma: float = 0.1,
) -> Hypergradients:
    """Differentiates the meta-loss of one episode with respect to theta, and checks the result.

    For training on it use `lopt.ForwardMode` or `lopt.MetaTask`, which are the same without the
    check.

    Args:
        inner: what is measured.
        theta: where.
        key: of the episode.
        mode: "forward", whose time grows with the number of weights and whose memory does not grow
            with the horizon, or "reverse", the other way around.
        sigma: how far to move theta to see whether the loss reacts where its derivative is zero.

    Raises:
        ValueError: if `mode` or `sigma` is out of range, or theta is not one of this optimizer.

    Example:
        >>> import jax, optax, lopt
        >>> from lopt.analysis.hypergradients import hypergradients
        >>> learned = lopt.learnable(optax.lion, learning_rate=0.1, b1=0.9)
        >>> inner = lopt.InnerTraining(lopt.tasks.QuadraticFamily(3), learned, horizon=30)
        >>> key = jax.random.key(0)
        >>> found = hypergradients(inner, learned.init(key), key, sigma=0.5)
        >>> [slope.verdict for slope in found.slopes]
        ['zero', 'fine']
    """
    if mode not in ("forward", "reverse"):
        raise ValueError(f"hypergradients(mode={mode!r}) must be 'forward' or 'reverse'.")
    check_positive("hypergradients", "sigma", sigma, 0.1)
    _check_theta(inner, theta, key)
    # Where arguments are arrays, Optax mixes dtypes, and JAX's derivative of a power does.
    with jax.numpy_dtype_promotion("standard"):
        loss, grads = _differentiate(inner, theta, key, mode)
        step = min(1e-4, float(jnp.finfo(loss.dtype).eps) ** (1 / 3))
        pairs = _losses(inner, theta, grads, key, step, sigma)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    slopes = tuple(
        _judge(jax.tree_util.keystr(path) or "theta", np.asarray(grad), np.asarray(pair), float(h))
        for (path, grad), pair, h in zip(leaves, *pairs, strict=True)
    )
    return Hypergradients(loss, grads, slopes, sigma)


def _check_theta(inner: InnerTraining, theta: Theta, key: Key) -> None:
    """Refuses a theta without weights, and one of another optimizer."""

    def shapes(theta: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(theta)
        return {jax.tree_util.keystr(path) or "theta": jnp.shape(leaf) for path, leaf in leaves}

    given, expected = shapes(theta), shapes(jax.eval_shape(inner.learned.init, key))
    if not given or given != expected:
        raise ValueError(
            f"hypergradients(theta) has {given or 'no weights'}, and inner.learned expects "
            f"{expected or 'none: there is nothing to differentiate by'}; try "
            "inner.learned.init(key)."
        )


@eqx.filter_jit
def _differentiate(inner: InnerTraining, theta: Theta, key: Key, mode: str) -> tuple[Scalar, Theta]:
    def loss(theta: Theta) -> tuple[Scalar, Scalar]:
        value = inner.meta_loss(theta, key)
        return value, value

    differentiate = jax.jacfwd if mode == "forward" else jax.grad
    grads, value = differentiate(loss, has_aux=True)(theta)
    return value, grads


@eqx.filter_jit
def _losses(
    inner: InnerTraining, theta: Theta, grads: Theta, key: Key, step: float, sigma: float
) -> tuple[Float[Array, "array 4"], Float[Array, " array"]]:
    """Returns the losses on both sides of theta, near and far, along each array; and how near."""
    leaves, structure = jax.tree.flatten(theta)
    directions = [_direction(grad) for grad in jax.tree.leaves(grads)]
    # Logarithms of what has 32 bits are below 128: of these the step is never more than `step`.
    near = [step * jnp.maximum(1, jnp.max(jnp.abs(leaf)) / 128) for leaf in leaves]
    far = [sigma * leaf.size**0.5 for leaf in leaves]

    def moved(i: int, by: Array | float) -> Theta:
        new = list(leaves)
        new[i] = leaves[i] + jnp.asarray(by, leaves[i].dtype) * directions[i]
        return jax.tree.unflatten(structure, new)

    ways = [(i, by) for i in range(len(leaves)) for by in (near[i], -near[i], far[i], -far[i])]
    many = jax.tree.map(lambda *each: jnp.stack(each), *(moved(i, by) for i, by in ways))
    losses = jax.lax.map(lambda theta: inner.meta_loss(theta, key), many)
    # Weights round what is added to them: what counts is how far they did move.
    gaps = [
        jax.tree.leaves(moved(i, h))[i] - jax.tree.leaves(moved(i, -h))[i]
        for i, h in enumerate(near)
    ]
    return losses.reshape(-1, 4), jnp.stack([jnp.linalg.norm(gap.ravel()) / 2 for gap in gaps])


def _direction(grad: Array) -> Array:
    """Returns the unit vector along the gradient; 1 for one weight, all alike without a slope."""
    grad = jnp.where(jnp.isfinite(grad), grad, 0)
    length = jnp.linalg.norm(grad.ravel())
    alike = jnp.full_like(grad, grad.size**-0.5)
    return alike if grad.size == 1 else jnp.where(length > 0, grad / length, alike)


def _judge(name: str, grad: np.ndarray, losses: np.ndarray, step: float) -> Slope:
    zeros, undefined = int(np.sum(grad == 0)), int(np.sum(~np.isfinite(grad)))
    derivative = float(grad.item() if grad.size == 1 else np.linalg.norm(grad))
    difference, reaction = float((losses[0] - losses[1]) / (2 * step)), losses[2] - losses[3]
    noise = 10 * float(np.finfo(losses.dtype).eps * np.abs(losses[0]) / step)
    verdict: Verdict = "fine"
    if undefined:
        verdict = "undefined"
    elif zeros == grad.size:
        verdict = "zero" if np.ptp(losses) != 0 else "unused"
    elif not abs(derivative - difference) <= 1e-2 * abs(derivative) + noise:
        verdict = "in doubt"
    elif noise > abs(derivative) / 2:
        verdict = "unchecked"
    return Slope(
        name, grad.size, derivative, difference, float(reaction), zeros, undefined, verdict
    )
