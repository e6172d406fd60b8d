"""Put to use: optimizers that are paid for breaking symmetries, fined, or kept from it.

The penalty on symmetry breaking is that of Sobotka et al. 2024 (arXiv:2312.07174), with a choice of
measures; the projection takes the broken component out of any optimizer's updates.
"""

from collections.abc import Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from lopt.analysis.dynamics.checks import check_optimizer, check_same_trees, update_or_refuse
from lopt.analysis.symmetry.deviation import check_names, deviation
from lopt.analysis.symmetry.generators import AbstractGenerator
from lopt.analysis.symmetry.places import Units
from lopt.core.checks import is_real
from lopt.core.inner import Objective, train_loss
from lopt.core.task import AbstractTask
from lopt.core.types import Params, Scalar, State, as_pytree
from lopt.core.unroll import Step

Measure = Literal["signed", "absolute", "cosine"]


def _as_tuple(generators: Any) -> Any:
    """Returns a list as a tuple, which static fields need."""
    return tuple(generators) if isinstance(generators, list) else generators


class SymmetryPenalty(eqx.Module):
    """An objective for `lopt.InnerTraining`: another, and a share of each step's deviations.

        base(task, step) + strength * mean over symmetries of |deviation of the updates|

    Params count as constants in it: the optimizer is to change its updates, not where it measures.

    The published penalty for translation is |sum W| + |sum b|; weight and bias are one generator
    here, and "signed" is |sum W + sum b|.

    Attributes:
        generators: the symmetries, of different names.
        strength: of the penalty; if it is negative, breaking them is rewarded.
        measure: "signed" for |sum_i <u, xi_i>| as published, "absolute" for sum_i |<u, xi_i>|, or
            "cosine", which larger updates do not make larger; see `deviation`.
        base: the objective besides.

    Example:
        >>> import jax, lopt
        >>> from lopt.analysis.symmetry import SymmetryPenalty, symmetries
        >>> task = lopt.tasks.mlp_classification(lopt.load_images("digits"), widths=(8,))
        >>> penalty = SymmetryPenalty(symmetries(task, jax.random.key(0)).generators, 0.1)
        >>> inner = lopt.InnerTraining(task, lopt.small_mlp(), 20, objective=penalty)
    """

    generators: tuple[AbstractGenerator, ...] = eqx.field(converter=_as_tuple)
    strength: float = eqx.field(static=True)
    measure: Measure = eqx.field(static=True, default="absolute")
    base: Objective = eqx.field(default=train_loss, converter=as_pytree)

    def __check_init__(self) -> None:
        check_names("SymmetryPenalty", self.generators)
        if not is_real(self.strength) or not -float("inf") < self.strength < float("inf"):
            raise ValueError(
                f"SymmetryPenalty(strength={self.strength!r}) must be a finite number; try 0.1."
            )
        if self.measure not in ("signed", "absolute", "cosine"):
            raise ValueError(
                f"SymmetryPenalty(measure={self.measure!r}) must be 'signed', 'absolute' or "
                "'cosine'; try 'absolute'."
            )

    def __call__(self, task: AbstractTask, step: Step, num_steps: Int[Array, ""]) -> Scalar:
        """Returns the objective of one step."""
        params = jax.lax.stop_gradient(step.params)
        found = [deviation(generator, params, step.updates) for generator in self.generators]
        sizes = [jnp.abs(getattr(each, self.measure)) for each in found]
        penalty = sum(sizes[1:], sizes[0]) / len(sizes)
        base = self.base(task, step, num_steps)
        return base + self.strength * penalty.astype(base.dtype)


def remove_breaking(
    optimizer: optax.GradientTransformation,
    generators: Sequence[AbstractGenerator],
    strength: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer whose updates have no component along the tangents of symmetries.

    What remains is the nearest update that changes nothing conserved to first order. The tangents
    of all symmetries are taken together, as they need not be orthogonal to one another; the time
    of a step grows by their number times the size of the params.

    Args:
        optimizer: any Optax optimizer; it is passed the loss as `value` and all else it is given.
        generators: the symmetries, of different names.
        strength: which share of the component to remove: 1 for all of it, 0 for nothing, negative
            to add to it.

    Raises:
        TypeError: if `optimizer` is none.
        ValueError: if there are no symmetries, or in `update` if it is given no params, or not what
            the optimizer needs.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> from lopt.analysis.symmetry import remove_breaking, translation
        >>> params = {"w": jnp.zeros((3, 2))}
        >>> optimizer = remove_breaking(optax.sign_sgd(1.0), [translation(params, "['w']")])
        >>> grads = {"w": jnp.array([[2.0, 1.0], [-1.0, 1.0], [-1.0, -2.0]])}
        >>> updates, _ = optimizer.update(grads, optimizer.init(params), params)
        >>> print(jnp.abs(updates["w"].sum(axis=0)).max() < 1e-6)
        True
    """
    check_optimizer("remove_breaking", "optimizer", optimizer, extra=True)
    check_names("remove_breaking", generators)
    if not is_real(strength) or not -float("inf") < strength < float("inf"):
        raise ValueError(
            f"remove_breaking(strength={strength!r}) must be a finite number; try 1.0."
        )
    optimizer = optax.with_extra_args_support(optimizer)

    def update(
        updates: Params, state: State, params: Params | None = None, **extra: Any
    ) -> tuple[Params, State]:
        if params is None:
            raise ValueError(
                "remove_breaking(...).update needs params, as tangents depend on them; try "
                "optimizer.update(grads, state, params)."
            )
        updates, state = update_or_refuse(
            "remove_breaking(...)", optimizer, updates, state, params, extra
        )
        broken = broken_component(generators, params, updates)
        updates = jax.tree.map(lambda u, b: u - strength * b, updates, broken)
        return updates, state

    return optax.GradientTransformationExtraArgs(optimizer.init, update)


def broken_component(
    generators: Sequence[AbstractGenerator], params: Params, direction: Params
) -> Params:
    """Returns the orthogonal projection of a direction on the tangents of some symmetries.

    Args:
        generators: the symmetries.
        params: where.
        direction: a tree like `params`.

    Raises:
        ValueError: if there are no symmetries, if something else is given as one, or if
            `direction` is not like `params`.
    """
    check_names("broken_component", generators)
    check_same_trees("broken_component", "direction", direction, "params", params)

    def along(direction: Params) -> Units:
        return jnp.concatenate([g.along(params, direction) for g in generators])

    def combine(amounts: Units) -> Params:
        ends: list[int] = []
        for generator in generators:
            ends.append((ends[-1] if ends else 0) + generator.units)
        parts = jnp.split(amounts, ends[:-1])
        trees = [g.combine(params, part) for g, part in zip(generators, parts, strict=True)]
        return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *trees)

    # Tangents of unit length, so that none is lost in the rounding of the others.
    lengths = jnp.concatenate([g.lengths(params) for g in generators])
    scales = 1 / jnp.where(lengths > 0, lengths, jnp.ones_like(lengths))
    rows = jnp.eye(len(scales), dtype=scales.dtype)
    gram = jax.lax.map(lambda row: scales * along(combine(scales * row)), rows)
    shares = jnp.linalg.pinv(gram, hermitian=True) @ (scales * along(direction))
    return combine(scales * shares)
