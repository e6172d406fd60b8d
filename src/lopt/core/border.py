"""The border to Optax: a learned optimizer with its weights, as an optimizer that is a pytree.

Params and gradients that come in are looked at here, once for all designs.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from lopt.core.checks import not_floats
from lopt.core.tensors import gradients
from lopt.core.types import NumSteps, Params, State, Theta, as_pytree


class Optimizer(optax.GradientTransformationExtraArgs):
    """A type of our own, for Flax to know as data; a pytree like every named tuple."""

    __slots__ = ()


class Begin(eqx.Module):
    """A learned optimizer's `init`; like any function equal to itself only, and can be hashed."""

    learned: Any
    theta: Theta
    num_steps: NumSteps

    def __call__(self, params: Any) -> State:
        """Returns the state before the first step."""
        if (bad := not_floats(params)) is not None:
            raise ValueError(
                f"init(params): params{bad}, and only floats are trained; leave it out, as "
                "eqx.filter(params, eqx.is_inexact_array) does, or use optax.masked."
            )
        return self.learned.begin(self.theta, params, self.num_steps)

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class Update(eqx.Module):
    """A learned optimizer's `update`, which is told of leaves that have a gradient alone."""

    begin: Begin

    def __call__(
        self, grads: Params, state: State, params: Params | None = None, **extra: Any
    ) -> tuple[Params, State]:
        """Returns updates and the next state."""
        learned, theta = self.begin.learned, self.begin.theta
        if params is None:
            return learned.update(theta, grads, state, None, **extra)
        structure: Any = jax.tree.structure(params)
        slopes = gradients(grads, params)
        moves = structure.unflatten([slope is not None for slope in slopes])
        grads, old = structure.unflatten(slopes), state

        def cut(leaf: Any, moves: bool) -> Any:
            return leaf if moves else None

        if not all(jax.tree.leaves(moves)):
            params = jax.tree.map(cut, params, moves)
            old = optax.tree_map_params(self.begin, cut, state, moves)
        places = jax.tree.map(lambda leaf: jax.typeof(leaf).sharding, (params, old))
        update = learned.update
        if meshes := [place.mesh for place in jax.tree.leaves(places[0]) if any(place.spec)]:
            specs = jax.tree.map(lambda place: place.spec, places)
            update = eqx.Partial(_placed, meshes[0], specs, update)
        try:
            updates, new = update(theta, grads, old, params, **extra)
        except (AttributeError, TypeError, ValueError) as error:
            own = jax.eval_shape(self.begin, params)
            if jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, old):
                raise
            raise ValueError(
                "update(state) has the state of another optimizer, or of other params; begin with "
                "optimizer.init(params)."
            ) from error
        if old is not state:
            is_cut = {"is_leaf": lambda leaf: leaf is None}
            new = jax.tree.map(lambda new, old: old if new is None else new, new, state, **is_cut)
        return updates, new

    __eq__ = object.__eq__
    __hash__ = object.__hash__


@eqx.filter_jit
def _placed(mesh: Any, specs: Any, update: Any, *args: Any, **extra: Any) -> tuple[Params, State]:
    """Lets the compiler choose between params and updates, where axes of a mesh are explicit."""
    arrays, others = eqx.partition((args, extra), eqx.is_array)

    def call(arrays: Any) -> tuple[Params, State]:
        args, extra = eqx.combine(arrays, others)
        return update(*args, **extra)

    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(call, out_sharding=specs)(arrays)


def _as_leaf(value: Any) -> Any:
    kept = as_pytree(value) if callable(value) else value
    return jnp.asarray(kept, float) if eqx.is_array_like(kept) else kept


class Scaled(eqx.Module):
    """A learned optimizer with updates rate (u - decay p), those of another being u.

    Optax's own pieces are no pytrees, and change dtypes in half precision.
    """

    learned: Any
    rate: Any = eqx.field(converter=_as_leaf)
    decay: Any = eqx.field(converter=_as_leaf)
    mask: Any = eqx.field(converter=_as_leaf)

    def begin(
        self, theta: Theta, params: Params, num_steps: NumSteps
    ) -> tuple[State, Int[Array, ""]]:
        """Returns the other's state, and the number of steps."""
        return self.learned.begin(theta, params, num_steps), jnp.zeros((), jnp.int32)

    def update(
        self, theta: Theta, grads: Params, state: State, params: Params | None, **extra: Any
    ) -> tuple[Params, State]:
        """Returns scaled updates and the next state."""
        inner, count = state
        updates, inner = self.learned.update(theta, grads, inner, params, **extra)
        if self.decay is not None:
            gradients(updates, params)  # refuses params that are None
            decays = jax.tree.broadcast(True if self.mask is None else self.mask(params), params)
            decay = self.decay(count) if callable(self.decay) else self.decay
            updates = jax.tree.map(
                lambda u, p, d: u - jnp.asarray(decay, u.dtype) * p if d else u,
                *(updates, params, decays),
            )
        rate = self.rate(count) if callable(self.rate) else self.rate
        updates = jax.tree.map(lambda u: jnp.asarray(rate, u.dtype) * u, updates)
        return updates, (inner, count + 1)
