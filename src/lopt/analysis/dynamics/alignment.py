"""Which known rule an optimizer resembles, step by step: angles, sizes, and its learning rate.

The cosine of two updates says whether they point the same way, the relative step how far the one
goes where the other would go one. The effective learning rate -<u, g> / <g, g> is that of the
gradient step nearest to the update.
"""

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lopt.analysis.dynamics.checks import check_same_trees
from lopt.analysis.dynamics.companions import Companions, mirrored
from lopt.core.types import Params, Scalar
from lopt.core.unroll import Step


class Alignment(eqx.Module):
    """How one update lies to another.

    Attributes:
        cosine: of the angle between them, in each tensor; no number where one of them is zero.
        relative: |u| / |reference|, in each tensor.
        overall_cosine, overall_relative: of all tensors together.
    """

    cosine: Float[Array, "*time tensor"]
    relative: Float[Array, "*time tensor"]
    overall_cosine: Float[Array, "*time"]
    overall_relative: Float[Array, "*time"]


class LearningRate(eqx.Module):
    """The effective learning rate -<u, g> / <g, g>; no number where the gradient is zero.

    Attributes:
        per_tensor: in each tensor.
        overall: of all tensors together.
    """

    per_tensor: Float[Array, "*time tensor"]
    overall: Float[Array, "*time"]


def alignment(updates: Params, reference: Params) -> Alignment:
    """Returns how updates lie to those of a reference.

    Raises:
        ValueError: if they differ in structure.

    Example:
        >>> import jax.numpy as jnp
        >>> from lopt.analysis.dynamics import alignment
        >>> found = alignment(jnp.array([3.0, 4.0]), jnp.array([1.0, 0.0]))
        >>> print(f"{found.overall_cosine:.1f} {found.overall_relative:.1f}")
        0.6 5.0
    """
    check_same_trees("alignment", "updates", updates, "reference", reference)
    # In units of the largest entry, as squares leave the range of numbers far sooner.
    (updates, size), (reference, unit) = _in_units(updates), _in_units(reference)
    both = inner_products(updates, reference)
    one, other = inner_products(updates, updates), inner_products(reference, reference)
    cosine, relative = _angle_and_size(both, one, other)
    overall, whole = _angle_and_size(jnp.sum(both), jnp.sum(one), jnp.sum(other))
    return Alignment(cosine, relative * size / unit, overall, whole * size / unit)


def effective_rate(updates: Params, grads: Params) -> LearningRate:
    """Returns the learning rate of the gradient step that is nearest to the updates.

    Raises:
        ValueError: if they differ in structure.
    """
    check_same_trees("effective_rate", "updates", updates, "grads", grads)
    (updates, size), (grads, unit) = _in_units(updates), _in_units(grads)
    along, square = inner_products(updates, grads), inner_products(grads, grads)
    rates = LearningRate(-along / square, -jnp.sum(along) / jnp.sum(square))
    return jax.tree.map(lambda rate: rate * size / unit, rates)


def inner_products(first: Params, second: Params) -> Float[Array, " tensor"]:
    """Returns the inner product of each tensor with its counterpart."""
    products = jax.tree.map(lambda a, b: jnp.vdot(a, b), first, second)
    return jnp.stack(jax.tree.leaves(products))


class AlignmentRecord(eqx.Module):
    """Records alignment with every companion: `unroll(task, companions.optimizer, ..., record=)`.

    Attributes:
        companions: with whose optimizer the run is trained.

    Example:
        >>> import jax, jax.numpy as jnp, optax, lopt
        >>> from lopt.analysis.dynamics import AlignmentRecord, Companions, reference_rules
        >>> task, key = lopt.tasks.Quadratic(jnp.ones(3), jnp.ones(3)), jax.random.key(0)
        >>> companions = Companions(optax.sgd(0.3), reference_rules(sgd=0.1))
        >>> state = lopt.start(task, companions.optimizer, task.init(key), key)
        >>> record = AlignmentRecord(companions)
        >>> _, found = lopt.unroll(task, companions.optimizer, state, 5, record=record)
        >>> print(found["SGD"].overall_cosine.round(6), found["SGD"].overall_relative.round(6))
        [1. 1. 1. 1. 1.] [3. 3. 3. 3. 3.]
    """

    companions: Companions

    def __call__(self, step: Step) -> dict[str, Alignment]:
        """Returns the alignment of this step's updates with those of each companion."""
        found = self.companions.updates(step)
        return {name: alignment(step.updates, updates) for name, updates in found.items()}


class OddnessRecord(eqx.Module):
    """Records the oddness defect |u(g) + u(-g)| / |u(g)|, zero for rules that are odd in gradients.

    Both sides see the same params, so that a rule which depends on them, such as one that decays
    weights, has a defect too: that part of its update does not turn around.

    Attributes:
        companions: from `with_mirror`, with whose optimizer the run is trained.
    """

    companions: Companions

    def __call__(self, step: Step) -> Scalar:
        """Returns the defect of this step's updates, all tensors together.

        Raises:
            ValueError: if the companions are not from `with_mirror`.
        """
        if "mirror" not in self.companions.others:
            raise ValueError(
                f"OddnessRecord(companions) has {list(self.companions.others)} and no 'mirror'; "
                "try with_mirror(optimizer)."
            )
        turned = self.companions.updates(step)["mirror"]
        both = jax.tree.map(jnp.add, step.updates, turned)
        square = jnp.sum(inner_products(both, both))
        return jnp.sqrt(square / jnp.sum(inner_products(step.updates, step.updates)))


def with_mirror(
    optimizer: optax.GradientTransformation,
    others: Mapping[str, optax.GradientTransformation] | None = None,
) -> Companions:
    """Returns companions with "mirror" among them, the optimizer itself with gradients negated.

    Raises:
        ValueError: if one of the others is named so.
    """
    if "mirror" in (others or {}):
        raise ValueError(
            "with_mirror(others) has one named 'mirror', which is that of the optimizer itself; "
            "try another name."
        )
    return Companions(optimizer, {**(others or {}), "mirror": mirrored(optimizer)})


def _in_units(tree: Params) -> tuple[Params, Scalar]:
    """Returns a tree as multiples of its largest entry, and that entry; of zeros, of 1."""
    sizes = [jnp.max(jnp.abs(leaf), initial=0.0) for leaf in jax.tree.leaves(tree)]
    largest = jnp.max(jnp.stack(sizes))
    unit = jnp.where((largest > 0) & (largest < jnp.inf), largest, jnp.ones_like(largest))
    return jax.tree.map(lambda leaf: leaf / unit.astype(leaf.dtype), tree), unit


def _angle_and_size(both: Array, one: Array, other: Array) -> tuple[Array, Array]:
    # Roots first: the product of two squares leaves the range of numbers far sooner.
    one, other = jnp.sqrt(one), jnp.sqrt(other)
    return both / one / other, one / other
