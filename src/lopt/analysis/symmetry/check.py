"""Checked, not believed: whether a task has a symmetry, measured on its own loss.

Twice: the derivative of the loss along each tangent must vanish on every batch, as a share of the
gradient's length; and a finite move along the group action must change nothing, as a share of what
a move of equal length in a random direction changes. Both are free of scale. What rounding leaves
of them is about the precision of the params; the tolerance is its square root.

Gradient and random direction are those of the entries that the symmetry moves, as others may matter
so much more that next to them anything is small. But where these entries hardly matter at all, as a
bias before a norm does not, rounding is all there is, and it is a share of the whole.
"""

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from lopt.analysis.symmetry.bench import Bench, prepare_bench
from lopt.analysis.symmetry.discrete import DiscreteMap
from lopt.analysis.symmetry.generators import AbstractGenerator, Symmetry, check_action
from lopt.analysis.symmetry.places import leaves_by_path
from lopt.core.checks import check_positive
from lopt.core.task import AbstractTask
from lopt.core.types import Key, Params

# How far the group action is followed: units are stretched by factors within exp(-0.5, 0.5).
FURTHEST = 0.5
# Of fewer units more than one permutation, or choice of signs, is tried.
FEW = 8


class Evidence(eqx.Module):
    """What was measured of one symmetry.

    Attributes:
        name: of the symmetry.
        slopes: of each unit, the largest |<grad L, xi>| / (|grad L| |xi|) over the batches, where
            the gradient is that of the entries that the symmetry moves; nothing for a discrete map.
        moved: the largest change of the loss by a finite move, as a share of that by a move of the
            same entries as far in a random direction; None if it was refused by its slope and not
            moved.
        idle: the number of units that had no say, because their tangent is zero.
        tolerance: the largest slope and move of a symmetry that holds.
    """

    name: str = eqx.field(static=True)
    slopes: Float[np.ndarray, " unit"]
    moved: float | None
    idle: int
    tolerance: float

    @property
    def slope(self) -> float:
        """The largest slope of all units."""
        return float(np.max(self.slopes, initial=0.0))

    @property
    def tested(self) -> bool:
        """Whether anything was measured: some unit had a say, and random moves changed the loss."""
        said = self.moved is None or bool(np.isfinite(self.moved))
        return said and (not len(self.slopes) or self.idle < len(self.slopes))

    @property
    def holds(self) -> bool:
        """Whether the task has the symmetry."""
        return self.within(self.tolerance)

    def within(self, most: float) -> bool:
        """Whether it was moved, and neither slope nor move is larger than `most`."""
        return self.tested and self.moved is not None and max(self.slope, self.moved) <= most

    def __str__(self) -> str:
        """One line for a table or an error."""
        moves = "it was not moved"
        if self.moved is not None:
            moves = f"the loss moves by {self.moved:.1e} of what random moves do"
        if not len(self.slopes):
            return f"{self.name}: {moves}"
        worst = int(np.argmax(self.slopes))
        return f"{self.name}: slope {self.slope:.1e} (unit {worst}), and {moves}"


def measure_slopes(
    generators: Sequence[AbstractGenerator], bench: Bench
) -> list[tuple[Float[np.ndarray, " unit"], int]]:
    """Returns the slope of each unit of each generator, and how many tangents are zero."""
    others = tuple(g for g in generators if not isinstance(g, Symmetry))
    found = iter(_slopes(others, bench.params, bench.grads) if others else ())
    # Of many layers there are hundreds, which take minutes to compile and nothing to compute.
    params, grads = (
        {path: np.asarray(leaf) for path, leaf in leaves_by_path(tree).items()}
        for tree in (bench.params, bench.grads)
    )
    whole = np.asarray(_lengths(bench.grads))
    measured = []
    for g in generators:
        if isinstance(g, Symmetry):
            g.arrays(bench.params)  # refuses those of another structure
            measured.append(_stretch_slopes(g, params, grads, whole))
        else:
            slopes, idle = next(found)
            measured.append((np.asarray(slopes), int(idle)))
    return measured


def measure_move(symmetry: AbstractGenerator | DiscreteMap, bench: Bench) -> float:
    """Returns the change of the loss by a finite move, as a share of that by random moves.

    It is no number if random moves change nothing, where nothing can be told.
    """
    amounts_key, control_key = jax.random.split(bench.key)
    dtype = jnp.result_type(*jax.tree.leaves(bench.params))
    if isinstance(symmetry, DiscreteMap):
        places = [
            symmetry(bench.params, a) for a in _discrete_amounts(symmetry, amounts_key, dtype)
        ]
    else:
        shape = (symmetry.units,)
        amounts = jax.random.uniform(amounts_key, shape, dtype, -FURTHEST, FURTHEST)
        places = [symmetry.act(bench.params, amounts)]
    before = bench.losses(bench.params)

    def change(params: Params) -> float:
        return float(jnp.max(jnp.abs(bench.losses(params) - before)))

    there, anywhere = (
        change(_equally_far(bench.params, places[0], control_key, all_entries))
        for all_entries in (False, True)
    )
    if not 0 < anywhere < np.inf:
        return float("nan")
    # The loss itself is rounded, but less than what is summed along the way.
    rounding = max(anywhere, float(jnp.max(jnp.abs(before))) / 8)
    return max(map(change, places)) / max(there, _rounding_share(dtype) * rounding)


def check_symmetry(
    symmetry: AbstractGenerator | DiscreteMap,
    task: AbstractTask,
    key: Key,
    *,
    params: Params | None = None,
    batches: int = 3,
    tolerance: float | None = None,
) -> Evidence:
    """Returns the evidence that a task has a symmetry.

    Args:
        symmetry: a generator, or a discrete map.
        task: the task.
        key: of batches and moves, and of the params.
        params: where to measure; by default initial params with noise.
        batches: on how many batches.
        tolerance: the largest slope and move, shares of those of other directions; by default the
            square root of the precision of the params.

    Raises:
        ValueError: if the task does not have it, with the measured slope; if nothing can be told;
            if the params are of another structure; or if its action is not the identity at zero.
    """
    check_task("check_symmetry", task)
    check_tolerance("check_symmetry", tolerance)
    bench = prepare_bench("check_symmetry", task, params, key, batches)
    evidence = gather_evidence(symmetry, bench, tolerance)
    if not evidence.tested:
        raise ValueError(
            f"{symmetry.name} cannot be told on {type(task).__name__}: all its tangents are "
            "zero at these params, or the loss is the same wherever they are moved; try others."
        )
    if not evidence.holds:
        raise ValueError(
            f"{type(task).__name__} does not have the symmetry {evidence}; at most "
            f"{evidence.tolerance:.1e} is rounding. Try lopt.analysis.symmetry.symmetries for "
            "those that it has."
        )
    return evidence


def gather_evidence(
    symmetry: AbstractGenerator | DiscreteMap, bench: Bench, tolerance: float | None = None
) -> Evidence:
    """Measures one symmetry, whether it holds or not."""
    if tolerance is None:
        tolerance = default_tolerance(bench.params)
    slopes, idle = np.zeros(0), 0
    if not isinstance(symmetry, DiscreteMap):
        check_group(symmetry, bench.params)
        [(slopes, idle)] = measure_slopes([symmetry], bench)
    return Evidence(symmetry.name, slopes, measure_move(symmetry, bench), idle, tolerance)


def check_tolerance(owner: str, tolerance: float | None) -> None:
    """Refuses a tolerance that is not positive and finite; None is the default."""
    if tolerance is not None:
        check_positive(owner, "tolerance", tolerance, 1e-6)


def default_tolerance(params: Params) -> float:
    """Returns the square root of the precision of some params."""
    return float(jnp.finfo(jnp.result_type(*jax.tree.leaves(params))).eps) ** 0.5


def _stretch_slopes(
    symmetry: Symmetry,
    params: dict[str, np.ndarray],
    grads: dict[str, np.ndarray],
    whole: Float[np.ndarray, " batch"],
) -> tuple[Float[np.ndarray, " unit"], int]:
    """Does what `_slopes` does for what stretches or shifts, without anything to compile."""
    batches, dtype = len(whole), whole.dtype
    along = np.zeros((batches, symmetry.units), dtype)
    squares, own = np.zeros(symmetry.units, dtype), np.zeros(batches, dtype)
    for place in symmetry.places:
        array, slopes = params[place.path], grads[place.path]
        moves = array if symmetry.motion == "stretch" else np.ones_like(array)
        xi = place.coefficient * moves
        # One unit owns the whole array, as one slice of it.
        view = (1, array.size) if place.axis is None else place.view or array.shape
        axis = place.axis or 0
        units = slice(place.first, place.first + view[axis])
        parts = np.moveaxis((slopes * xi).reshape(batches, *view), axis + 1, 1)
        along[:, units] += parts.reshape(batches, view[axis], -1).sum(axis=2)
        tangents = np.moveaxis(xi.reshape(view), axis, 0).reshape(view[axis], -1)
        squares[units] += np.sum(tangents**2, axis=1)
        own += np.sum(np.where(xi == 0, 0, slopes).reshape(batches, -1) ** 2, axis=1)
    length = np.maximum(np.sqrt(own), _rounding_share(dtype) * whole)[:, None]
    lengths = np.sqrt(squares)
    found = np.abs(along) / np.maximum(length * lengths, np.finfo(dtype).tiny)
    return found.max(axis=0), int(np.sum(lengths == 0))


@eqx.filter_jit
def _slopes(
    generators: tuple[AbstractGenerator, ...], params: Params, grads: Params
) -> list[tuple[Array, Array]]:
    """Returns the largest slope of each unit over the gradients, and how many tangents are zero."""
    whole = _lengths(grads)
    found = []
    for generator in generators:
        # Not random, which takes as long to compile as all else; sines of integers are never zero.
        amounts = jnp.sin(1 + jnp.arange(generator.units, dtype=whole.dtype))
        somewhere = generator.combine(params, amounts)
        own = jax.tree.map(lambda g, s: jnp.where(s == 0, jnp.zeros_like(g), g), grads, somewhere)
        length = jnp.maximum(_lengths(own), _rounding_share(whole.dtype) * whole)[:, None]
        xi = generator.lengths(params)[None]
        along = jax.vmap(lambda g, of=generator: of.along(params, g))(grads)
        slopes = jnp.abs(along) / jnp.maximum(length * xi, jnp.finfo(length.dtype).tiny)
        found.append((jnp.max(slopes, axis=0), jnp.sum(xi == 0)))
    return found


def _lengths(grads: Params) -> Float[Array, " batch"]:
    """Returns the length of each gradient."""
    squares = [jnp.sum(g.reshape(len(g), -1) ** 2, axis=1) for g in jax.tree.leaves(grads)]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def _rounding_share(dtype: Any) -> float:
    """Returns below which share of the whole some entries do not matter, but for rounding.

    Times the tolerance it is 32 times the precision.
    """
    return 32 * float(jnp.finfo(dtype).eps) ** 0.5


@functools.partial(jax.jit, static_argnames="all_entries")
def _equally_far(params: Params, moved: Params, key: Key, all_entries: bool) -> Params:
    """Returns params moved as far as others are, in a random direction: all, or those moved."""
    flat, restore = jax.flatten_util.ravel_pytree(params)
    change = jax.flatten_util.ravel_pytree(moved)[0] - flat
    noise = jax.random.normal(key, flat.shape, flat.dtype)
    if not all_entries:
        noise = jnp.where(change == 0, jnp.zeros_like(noise), noise)
    length = jnp.maximum(jnp.linalg.norm(noise), jnp.finfo(flat.dtype).tiny)
    return restore(flat + noise * (jnp.linalg.norm(change) / length))


def _discrete_amounts(
    symmetry: DiscreteMap, key: Key, dtype: np.dtype
) -> list[Num[Array, " unit"]]:
    """Returns what a discrete map is tried with: all of few units at once is not enough.

    A rotation of three units, or the sign of two, may be a symmetry where those of each are none.
    """
    units = symmetry.units
    order = jax.random.permutation(key, units)
    if symmetry.motion == "permute":
        # One cycle through all units, so that none stays where it is.
        tried = [jnp.zeros_like(order).at[order].set(jnp.roll(order, 1))]
        if 2 < units < FEW:
            tried.append(jnp.arange(units).at[order[:2]].set(order[1::-1]))
        return tried
    half = jnp.where(order < max(units // 2, 1), -1, 1).astype(dtype)
    one = jnp.where(order == 0, -1, 1).astype(dtype)
    return [half, one] if 3 < units < FEW else [half]


def check_task(owner: str, task: Any) -> None:
    """Refuses what is no task, such as a model.

    Raises:
        ValueError: naming it.
    """
    if not isinstance(task, AbstractTask):
        raise ValueError(
            f"{owner}(task) must be a task, and a {type(task).__name__} is none; try "
            "lopt.analysis.symmetry.ModelLoss(model, evaluate, sample) of a model and its loss."
        )


def check_group(generator: AbstractGenerator, params: Params) -> None:
    """Refuses an action that changes the structure of params, or moves them by no amount.

    Raises:
        ValueError: with how far they are moved.
    """
    check_action(generator, params, dtypes=True)
    zero = jnp.zeros(generator.units, jnp.result_type(*jax.tree.leaves(params)))
    here, there = (
        jax.flatten_util.ravel_pytree(tree)[0] for tree in (params, generator.act(params, zero))
    )
    moved, length = float(jnp.linalg.norm(there - here)), float(jnp.linalg.norm(here))
    if not moved <= default_tolerance(params) * length:
        raise ValueError(
            f"{type(generator).__name__}({generator.name!r}) must leave params as they are for "
            f"amounts of zero; it moves params of length {length:.1e} by {moved:.1e}. Try an "
            "action that is the identity there."
        )
