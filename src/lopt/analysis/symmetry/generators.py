"""A symmetry is its generator: tangents along which the loss of a network does not change.

If psi(params, a) leaves the loss as it is for every a, so does the tangent xi = d psi / da at zero:
<grad L, xi(params)> = 0. A symmetry of many neurons has one tangent for each, and they are handled
together: "unit" is the axis that counts them. See Kunin et al. 2021 (arXiv:2012.04728).
"""

import abc
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from lopt.analysis.symmetry.places import (
    Place,
    Tensor,
    Units,
    array_at,
    leaves_by_path,
    with_leaves,
)
from lopt.core.checks import check_integer
from lopt.core.types import Params, Scalar


class AbstractGenerator(eqx.Module):
    """A continuous symmetry of a loss.

    Attributes:
        name: what tables and errors call it; different for all symmetries of a network.
        kind: "translation", "scale", "rescale", ...: what symmetries of several layers share.
        units: the number of tangents.
    """

    name: eqx.AbstractVar[str]
    kind: eqx.AbstractVar[str]
    units: eqx.AbstractVar[int]

    @abc.abstractmethod
    def combine(self, params: Params, amounts: Units) -> Params:
        """Returns sum_i amounts_i xi_i(params), a tree like `params`."""

    @abc.abstractmethod
    def along(self, params: Params, direction: Params) -> Units:
        """Returns <direction, xi_i(params)> for each unit i."""

    @abc.abstractmethod
    def lengths(self, params: Params) -> Units:
        """Returns |xi_i(params)| for each unit i."""

    @abc.abstractmethod
    def act(self, params: Params, amounts: Units) -> Params:
        """Returns psi(params, amounts): the params moved along the symmetry by finite amounts.

        d act(params, amounts) / d amounts at zero is `tangents(params)`.
        """

    @abc.abstractmethod
    def conserved(self, params: Params) -> Units:
        """Returns for each unit what gradient flow conserves; its gradients are tangents."""

    @property
    @abc.abstractmethod
    def knows_conserved(self) -> bool:
        """Whether `conserved` is known."""

    def share(self, params: Params, along: Units) -> Scalar:
        """Returns the squared length of what of a direction lies along the tangents.

        Args:
            params: where.
            along: <direction, xi_i> of each unit.
        """
        lengths = self.lengths(params)
        # Units own different entries, so that their tangents are orthogonal.
        return jnp.sum((along / jnp.maximum(lengths, jnp.finfo(lengths.dtype).tiny)) ** 2)

    def tangents(self, params: Params) -> PyTree[Float[Array, "unit ..."]]:
        """Returns the tangents, on a new first axis of every array of `params`."""
        dtype = jnp.result_type(*jax.tree.leaves(params))
        each = jnp.eye(self.units, dtype=dtype)
        return jax.vmap(lambda amounts: self.combine(params, amounts))(each)


class Symmetry(AbstractGenerator):
    """Stretches or shifts the slices of arrays that belong to units.

    With c the coefficient of a place and a the amount of the unit that owns an entry theta of it,

        "stretch":  xi = c theta,  psi = theta exp(c a),  conserved: sum of c theta^2
        "shift":    xi = c,        psi = theta + c a,     conserved: sum of c theta

    The functions of `lopt.analysis.symmetry.builders` build the known ones.

    Attributes:
        name, kind, units: see `AbstractGenerator`.
        motion: "stretch" or "shift".
        places: the arrays; none twice.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"in": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "out": jnp.array([[5.0, 6.0]])}
        >>> places = (Place("['in']", axis=0), Place("['out']", axis=1, coefficient=-1.0))
        >>> relu = Symmetry("hidden units", "rescale", 2, "stretch", places)
        >>> relu.combine(params, jnp.array([1.0, 0.0]))
        {'in': Array([[1., 2.], [0., 0.]], dtype=...), 'out': Array([[-5., -0.]], dtype=...)}
        >>> relu.conserved(params)  # |row|^2 - |column|^2
        Array([-20., -11.], dtype=...)
    """

    name: str = eqx.field(static=True)
    kind: str = eqx.field(static=True)
    units: int = eqx.field(static=True)
    motion: Literal["stretch", "shift"] = eqx.field(static=True)
    places: tuple[Place, ...] = eqx.field(static=True)

    def __check_init__(self) -> None:
        check_integer(f"Symmetry({self.name!r})", "units", self.units)
        if self.motion not in ("stretch", "shift"):
            raise ValueError(
                f"Symmetry(motion={self.motion!r}) must be 'stretch' or 'shift'; try 'stretch'."
            )
        paths = [place.path for place in self.places]
        if not paths or len(set(paths)) < len(paths):
            raise ValueError(
                f"Symmetry(places at {paths}) must name at least one array and none twice; try a "
                "FreeGenerator for arrays that are tied to themselves."
            )

    def combine(self, params: Params, amounts: Units) -> Params:
        """Returns sum_i amounts_i xi_i(params)."""
        pattern = self._pattern(params, amounts)
        if self.motion == "stretch":
            pattern = {path: tensor * pattern[path] for path, tensor in self.arrays(params).items()}
        return with_leaves(params, pattern, others=False)

    def act(self, params: Params, amounts: Units) -> Params:
        """Returns the params stretched or shifted by `amounts`."""
        pattern, own = self._pattern(params, amounts), self.arrays(params)
        if self.motion == "stretch":
            moved = {path: tensor * jnp.exp(pattern[path]) for path, tensor in own.items()}
        else:
            moved = {path: tensor + pattern[path] for path, tensor in own.items()}
        return with_leaves(params, moved, others=True)

    def along(self, params: Params, direction: Params) -> Units:
        """Returns <direction, xi_i(params)> for each unit i."""
        own, towards = self.arrays(params), self.arrays(direction)
        if self.motion == "stretch":
            towards = {path: tensor * own[path] for path, tensor in towards.items()}
        return self._gather(towards)

    def lengths(self, params: Params) -> Units:
        """Returns |xi_i(params)| for each unit i."""
        own = self.arrays(params)
        squares = {
            path: tensor**2 if self.motion == "stretch" else jnp.ones_like(tensor)
            for path, tensor in own.items()
        }
        return jnp.sqrt(self._gather(squares, power=2))

    def conserved(self, params: Params) -> Units:
        """Returns sum c theta^2 of what each unit owns, or sum c theta for a shift."""
        if self.motion == "stretch":
            return self.inner(params, params)
        return self._gather(self.arrays(params))

    @property
    def knows_conserved(self) -> bool:
        """It always is."""
        return True

    def inner(self, one: Params, other: Params) -> Units:
        """Returns the signed inner products [one, other]_i = sum c one other of each unit."""
        first, second = self.arrays(one), self.arrays(other)
        return self._gather({path: first[path] * second[path] for path in first})

    def arrays(self, params: Params) -> dict[str, Tensor]:
        """Returns the arrays this symmetry acts on, refusing params of another structure."""
        owner, leaves = f"The symmetry {self.name!r}", leaves_by_path(params)
        own = {}
        for place in self.places:
            own[place.path] = array_at(owner, leaves, place.path)
            place.check(owner, own[place.path], self.units)
        return own

    def _pattern(self, params: Params, amounts: Units) -> dict[str, Tensor]:
        check_amounts(self, amounts)
        own = self.arrays(params)
        return {
            place.path: place.coefficient * place.spread(amounts, own[place.path])
            for place in self.places
        }

    def _gather(self, tensors: dict[str, Tensor], power: int = 1) -> Units:
        gathered = [
            place.coefficient**power * place.gather(tensors[place.path], self.units)
            for place in self.places
        ]
        return sum(gathered[1:], gathered[0])


class FreeGenerator(AbstractGenerator):
    """A symmetry given by functions, for those that are no stretching or shifting of slices.

    Attributes:
        name, kind, units: see `AbstractGenerator`.
        action: (params, amounts) to the moved params; the tangents are its derivative at zero.
        quantity: params to what gradient flow conserves, one number for each unit, if known.
        orthogonal: whether tangents are known to be orthogonal to one another; where they are not,
            what lies along them takes a system of equations to tell.
    """

    name: str = eqx.field(static=True)
    kind: str = eqx.field(static=True)
    units: int = eqx.field(static=True)
    action: Callable[[Params, Units], Params]
    quantity: Callable[[Params], Units] | None = None
    orthogonal: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        check_integer(f"FreeGenerator({self.name!r})", "units", self.units)

    def combine(self, params: Params, amounts: Units) -> Params:
        """Returns the derivative of the action along `amounts`."""
        check_action(self, params)
        rest = jnp.zeros_like(amounts)
        return jax.jvp(lambda amounts: self.action(params, amounts), (rest,), (amounts,))[1]

    def act(self, params: Params, amounts: Units) -> Params:
        """Returns the moved params."""
        check_amounts(self, amounts)
        return self.action(params, amounts)

    def along(self, params: Params, direction: Params) -> Units:
        """Returns <direction, xi_i(params)> for each unit i."""
        check_action(self, params)
        given: Any = jax.eval_shape(lambda: params)
        found: Any = jax.eval_shape(lambda: direction)
        if not _alike(found, given):
            raise ValueError(
                f"FreeGenerator({self.name!r}).along(direction) must be of the structure of "
                f"params, {given}; it is {found}. Try gradients or updates at these params."
            )
        rest = jnp.zeros(self.units, jnp.result_type(*jax.tree.leaves(params)))
        _, transposed = jax.vjp(lambda amounts: self.action(params, amounts), rest)
        same = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), direction, params)
        return transposed(same)[0]

    def lengths(self, params: Params) -> Units:
        """Returns |xi_i(params)| for each unit i."""

        def square(amounts: Units) -> Scalar:
            leaves = jax.tree.leaves(self.combine(params, amounts))
            squares = [jnp.sum(leaf**2) for leaf in leaves]
            return sum(squares[1:], squares[0])

        # One by one, as all tangents at once need as much memory as units times params.
        dtype = jnp.result_type(*jax.tree.leaves(params))
        return jnp.sqrt(jax.lax.map(square, jnp.eye(self.units, dtype=dtype)))

    def share(self, params: Params, along: Units) -> Scalar:
        """Returns the squared length of what of a direction lies along the tangents."""
        if self.orthogonal:
            return super().share(params, along)
        rows = jnp.eye(self.units, dtype=along.dtype)
        gram = jax.lax.map(lambda row: self.along(params, self.combine(params, row)), rows)
        return along @ jnp.linalg.pinv(gram, hermitian=True) @ along

    def conserved(self, params: Params) -> Units:
        """Returns what gradient flow conserves.

        Raises:
            ValueError: if that is not known.
        """
        if self.quantity is None:
            raise ValueError(
                f"FreeGenerator({self.name!r}, quantity=None) does not know what gradient flow "
                "conserves; try quantity=, a function of params whose gradients are the tangents."
            )
        return self.quantity(params)

    @property
    def knows_conserved(self) -> bool:
        """Whether it was given."""
        return self.quantity is not None


def check_amounts(generator: AbstractGenerator, amounts: Units) -> None:
    """Refuses amounts that are not one number for each unit."""
    check_units(f"The symmetry {generator.name!r}", generator.units, amounts, "jnp.zeros")


def check_units(owner: str, units: int, amounts: Any, like: str) -> None:
    """Refuses what is not an array of one number for each unit."""
    if not isinstance(amounts, (jax.Array, np.ndarray)) or amounts.shape != (units,):
        found = f"of shape {amounts.shape}" if hasattr(amounts, "shape") else f"{amounts!r}"
        raise ValueError(
            f"{owner} has {units} units; amounts {found} must be an array of one number for each, "
            f"try {like}({units})."
        )


def check_action(generator: AbstractGenerator, params: Params, dtypes: bool = False) -> None:
    """Refuses a group action that does not return params of the structure it was given.

    It is traced, not run.
    """
    amounts = jnp.zeros(generator.units, jnp.result_type(*jax.tree.leaves(params)))
    moved: Any = jax.eval_shape(generator.act, params, amounts)
    given: Any = jax.eval_shape(lambda: params)
    if not _alike(moved, given, dtypes):
        raise ValueError(
            f"{type(generator).__name__}({generator.name!r}) must move params to params of the "
            f"same structure; it makes {moved} of {given}. Try lopt.analysis.symmetry's builders."
        )


def _alike(one: Any, other: Any, dtypes: bool = False) -> bool:
    """Returns whether two trees are of the same structure and shapes, and dtypes if need be."""
    structures: list[Any] = [jax.tree.structure(one), jax.tree.structure(other)]
    return structures[0] == structures[1] and all(
        a.shape == b.shape and (not dtypes or a.dtype == b.dtype)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )
