"""Measured: how far gradients and updates leave the symmetries of a network, while it trains.

<u, xi> is zero for the gradients of a loss that has the symmetry, whatever the batch. Of an update
it is what the optimizer adds of its own, and exactly the first-order change of what gradient flow
conserves: |theta + u|^2 = |theta|^2 + 2 <theta, u> + |u|^2. The measures are those of Sobotka et
al. 2024 (arXiv:2312.07174), and two that do not cancel and do not grow with the learning rate.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lopt.analysis.dynamics.checks import check_same_trees
from lopt.analysis.symmetry.generators import AbstractGenerator
from lopt.core.types import Params, Scalar
from lopt.core.unroll import Step


class Deviation(eqx.Module):
    """How far a direction leaves one symmetry.

    Attributes:
        signed: sum_i <u, xi_i>, as published. Units cancel one another: it hides up to ten times.
        absolute: sum_i |<u, xi_i>|.
        cosine: the share of the length of u that lies along the symmetry: where units own entries,
            the length of their cosines <u, xi_i> / (|u| |xi_i|). Zero for a direction of zeros, or
            so short that its square has no precision left (3e-16 in 32 bits); no number where there
            is none, or where the square is infinite.
        units: <u, xi_i> of each unit, or nothing.
    """

    signed: Scalar
    absolute: Scalar
    cosine: Scalar
    units: Float[Array, " unit"] | None = None


def deviation(
    generator: AbstractGenerator, params: Params, direction: Params, *, units: bool = False
) -> Deviation:
    """Returns how far a direction leaves a symmetry.

    Differentiable in `direction`, with derivatives zero where there is no deviation.

    Args:
        generator: the symmetry.
        params: where.
        direction: a tree like `params`: gradients, or updates.
        units: whether to return what each unit has.

    Raises:
        ValueError: if `direction` is not like `params`.

    Example:
        >>> import jax.numpy as jnp
        >>> from lopt.analysis.symmetry import translation
        >>> params = {"w": jnp.ones((2, 1))}
        >>> softmax = translation(params, "['w']")
        >>> found = deviation(softmax, params, {"w": jnp.array([[3.0], [4.0]])})
        >>> print(found.signed, jnp.round(found.cosine, 3))  # 7 / (5 * sqrt(2))
        7.0 0.99
    """
    check_same_trees("deviation", "direction", direction, "params", params)
    along = generator.along(params, direction)
    info = jnp.finfo(along.dtype)
    # Products, as they add many numbers at a time.
    squares = [
        jnp.vdot(leaf, leaf, precision=jax.lax.Precision.HIGHEST)
        for leaf in jax.tree.leaves(direction)
    ]
    square = sum(squares[1:], squares[0])
    # Far below, squares of entries have vanished, and a quotient of what is left means nothing.
    some = ~(square <= info.tiny / info.eps)
    norm = jnp.sqrt(jnp.where(some, square, jnp.ones_like(square)))
    cosine = _safe_root(generator.share(params, along / norm))
    cosine = jnp.where(some, cosine, jnp.zeros_like(square))
    return Deviation(
        signed=jnp.sum(along),
        absolute=jnp.sum(jnp.abs(along)),
        cosine=jnp.where(square < jnp.inf, cosine, jnp.full_like(square, jnp.nan)),
        units=along if units else None,
    )


class SymmetryReading(eqx.Module):
    """What a `SymmetryProbe` records of one symmetry in one step.

    Attributes:
        grads: the deviation of the gradients: rounding.
        updates: that of the updates.
        conserved: of each unit, what gradient flow conserves, before the step.
    """

    grads: Deviation
    updates: Deviation
    conserved: Float[Array, " unit"] | None


class SymmetryProbe(eqx.Module):
    """Records deviations of gradients and updates, and what should be conserved, of every step.

    A record for `lopt.unroll`; it returns a `SymmetryReading` for each symmetry, by name.

    Attributes:
        generators: the symmetries, of different names.
        units: whether to keep the deviations of each unit.

    Example:
        >>> import jax, lopt, optax
        >>> from lopt.analysis.symmetry import SymmetryProbe, translation
        >>> key, task = jax.random.key(0), lopt.tasks.mlp_classification(lopt.load_images("digits"))
        >>> params = task.init(key)
        >>> probe = SymmetryProbe((translation(params, ".layers[1].weight"),))
        >>> optimizer = optax.adam(1e-2)
        >>> state = lopt.start(task, optimizer, params, key)
        >>> _, readings = lopt.unroll(task, optimizer, state, 20, record=probe)
        >>> adam = readings["translation of .layers[1].weight"]
        >>> bool(adam.grads.cosine.max() < 1e-6), bool(adam.updates.cosine.max() > 1e-2)
        (True, True)
    """

    generators: tuple[AbstractGenerator, ...]
    units: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        check_names("SymmetryProbe", self.generators)

    def __call__(self, step: Step) -> dict[str, SymmetryReading]:
        """Returns what there is to say of one step."""
        return {
            generator.name: SymmetryReading(
                deviation(generator, step.params, step.grads, units=self.units),
                deviation(generator, step.params, step.updates, units=self.units),
                generator.conserved(step.params) if generator.knows_conserved else None,
            )
            for generator in self.generators
        }


def drift(conserved: Float[Array, "step unit"]) -> Float[Array, " step"]:
    """Returns how far what is conserved has moved since the first step, summed over units.

    As a share of sum_i |conserved_i| at the first step, or absolute if that is zero.

    Raises:
        ValueError: if there is no step, or not one number for each step and unit.
    """
    if np.ndim(conserved) != 2 or not len(conserved):
        raise ValueError(
            f"drift(conserved) must have the axes step and unit, and has shape "
            f"{np.shape(conserved)}; try readings[name].conserved of a SymmetryProbe."
        )
    conserved = jnp.asarray(conserved)
    start = jnp.sum(jnp.abs(conserved[0]))
    moved = jnp.sum(jnp.abs(conserved - conserved[:1]), axis=1)
    return moved / jnp.where(start > 0, start, jnp.ones_like(start))


def check_names(owner: str, generators: Sequence[AbstractGenerator]) -> None:
    """Refuses no symmetries at all, and several of one name."""
    names = [generator.name for generator in generators]
    if not names:
        raise ValueError(
            f"{owner}(generators=()) needs at least one symmetry; try those of "
            "lopt.analysis.symmetry.symmetries(task, key)."
        )
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{owner}(generators) has {names.count(name)} symmetries named {name!r}; try name= "
                "when they are built."
            )


def _safe_root(square: Scalar) -> Scalar:
    """Returns the square root, whose derivative at zero is zero."""
    zero = square == 0
    root = jnp.sqrt(jnp.where(zero, jnp.ones_like(square), square))
    return jnp.where(zero, jnp.zeros_like(square), root)
