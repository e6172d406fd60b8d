"""The one loop of lopt, which everything else in the library transforms.

`unroll` trains networks (a task, an optimizer) and optimizers (a meta-gradient estimator, an
outer optimizer) alike: `n` times, ask the estimator for a gradient, and `take` a step with it.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from lopt.core.checks import check_integer, check_key, not_floats
from lopt.core.estimator import AbstractGradientEstimator, Estimate
from lopt.core.types import Key, Params, Record, Scalar, State

# What a task gives this name by `jax.ad_checkpoint.checkpoint_name` is kept and not recomputed when
# steps are differentiated in reverse: small things such as the rows that a batch consists of.
KEPT = "lopt.kept"


class TrainState(eqx.Module):
    """Everything that the rest of a run depends on; the key of each step is folded into `key`."""

    params: Params
    opt_state: State
    estimator_state: State
    key: Key
    step: Int[Array, ""]


class Step(eqx.Module):
    """All that one step can see, for `record` to keep what it wants of it.

    Attributes:
        step, key: the number of steps taken before this one, and its key.
        params, opt_state: as this step found them; `loss` and `grads` were taken at `params`.
        estimator_state, new_opt_state: as this step leaves them.
        loss, grads, dropped, extra: the estimate.
        updates: what was added to `params`.
    """

    step: Int[Array, ""]
    key: Key
    params: Params
    opt_state: State
    estimator_state: State
    loss: Scalar
    grads: Params
    updates: Params
    dropped: Int[Array, ""] | int = 0
    extra: dict[str, Scalar] = eqx.field(default_factory=dict)
    new_opt_state: State = None


def loss_of(step: Step) -> Scalar:
    """Records the loss of each step, and nothing else."""
    return step.loss


@eqx.filter_jit
def start(
    estimator: AbstractGradientEstimator,
    optimizer: optax.GradientTransformation,
    params: PyTree,
    key: Key,
) -> TrainState:
    """Returns the state of a run before its first step.

    Args:
        estimator: a task, or an estimator of a meta-gradient.
        optimizer: any Optax optimizer.
        params: a pytree of floating-point arrays, others are refused.
        key: the key of the whole run, from `jax.random.key`.
    """
    check_key("start", key)
    if (bad := not_floats(params)) is not None:
        raise TypeError(
            f"start(params): params{bad}; they must be floating-point arrays, try "
            "equinox.partition(model, equinox.is_inexact_array)[0]."
        )
    # A weakly typed leaf would become strongly typed after one step and be traced twice.
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), params)
    # Steps fold 0, 1, 2, ... into the key; this is none of them, and free if it is not used.
    carried = estimator.prepare(params, jax.random.fold_in(key, 2**32 - 1))
    return TrainState(params, optimizer.init(params), carried, key, jnp.zeros((), jnp.int32))


def take(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    estimate: Estimate,
    estimator_state: State,
    key: Key,
) -> tuple[TrainState, Step]:
    """Takes one step with an estimate at `state.params`, wherever that was made.

    With u, o' = optimizer(g, o, params) the step is params' = params + u. The optimizer is passed
    the loss as `value`, and `estimate.extra`; `key` is for the record alone.
    """
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        estimate.grads, state.opt_state, state.params, value=estimate.loss, **estimate.extra
    )
    found = state.step, key, state.params, state.opt_state, estimator_state
    given = estimate.loss, estimate.grads, updates, estimate.dropped, estimate.extra
    params = optax.apply_updates(state.params, updates)
    new = TrainState(params, opt_state, estimator_state, state.key, state.step + 1)
    return new, Step(*found, *given, new_opt_state=opt_state)


@eqx.filter_jit
def unroll(
    estimator: AbstractGradientEstimator,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    num_steps: int,
    *,
    record: Callable[[Step], Any] = loss_of,
    segments: int = 1,
    keep_products: bool = False,
) -> tuple[TrainState, Record]:
    """Takes `num_steps` steps of training: a scan of estimate and `take`.

    Splitting a run changes nothing: `m + n` steps equal `m` steps followed by `n`. Reverse-mode
    differentiation computes each step again, so that its memory grows by one state per step.

    Args:
        estimator: a task, or an estimator of a meta-gradient.
        optimizer: any Optax optimizer. One that is made anew for each call is compiled anew.
        state: from `start`, or from an earlier `unroll`.
        num_steps: at least 1; a Python integer.
        record: what to keep of each step, a function from `Step` to any pytree of arrays.
        segments: into how many equal parts the steps are cut for reverse mode: memory holds this +
            `num_steps` / this states, for another half of the time (Griewank & Walther 2000).
        keep_products: whether reverse mode keeps every matrix product of the forward pass.

    Returns:
        The last state, and what was recorded, with a leading axis of `num_steps` on every array.

    Raises:
        ValueError: if `num_steps` is not a positive integer, or `segments` does not divide it.
    """
    check_integer("unroll", "num_steps", num_steps, hint=100)
    check_segments("unroll", segments, "num_steps", num_steps)

    @functools.partial(jax.checkpoint, prevent_cse=False, policy=_policy(keep_products))
    def step(state: TrainState, key: Key) -> tuple[TrainState, Any]:
        found, carried = estimator.estimate(state.params, state.estimator_state, key)
        state, seen = take(optimizer, state, found, carried, key)
        return state, record(seen)

    def keyed_step(state: TrainState, _: None) -> tuple[TrainState, Any]:
        return step(state, jax.random.fold_in(state.key, state.step))

    def segment(state: TrainState, _: None) -> tuple[TrainState, Record]:
        return jax.lax.scan(keyed_step, state, length=num_steps // segments)

    if segments == 1:
        return segment(state, None)
    state, kept = jax.lax.scan(jax.checkpoint(segment, prevent_cse=False), state, length=segments)
    return state, jax.tree.map(lambda leaf: leaf.reshape(num_steps, *leaf.shape[2:]), kept)


def _policy(keep_products: bool) -> Callable[..., bool]:
    """Returns what reverse mode keeps of a step besides its state."""
    own = jax.checkpoint_policies
    named = own.save_only_these_names(KEPT)
    # What lies between matrix products is computed again sooner than it is fetched from memory.
    return own.save_from_both_policies(named, own.dots_saveable) if keep_products else named


def check_segments(name: str, segments: int, what: str, steps: int) -> None:
    """Refuses a number of checkpoint segments that does not divide `steps`."""
    if segments < 1 or steps % segments:
        divisors = (d for d in range(1, steps + 1) if not steps % d)
        raise ValueError(
            f"{name}(segments={segments!r}) must divide {what}={steps}; "
            f"try {min(divisors, key=lambda d: d + steps // d)}."
        )
