"""The one loop of lopt.

`unroll` trains networks (a task, an optimizer) and optimizers (a meta-gradient estimator, an
outer optimizer) alike: `n` times, ask the estimator for a gradient, ask the optimizer for an
update, add it to the parameters. Everything else in the library transforms this function.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from lopt.core.checks import check_integer, check_key
from lopt.core.estimator import AbstractGradientEstimator
from lopt.core.types import Key, Params, Record, Scalar, State

# What a task gives this name by `jax.ad_checkpoint.checkpoint_name` is kept and not recomputed when
# steps are differentiated in reverse: small things such as the rows that a batch consists of.
KEPT = "lopt.kept"


class TrainState(eqx.Module):
    """Everything that the rest of a run depends on.

    Attributes:
        params: the weights being trained.
        opt_state: the optimizer's state.
        estimator_state: the gradient estimator's state.
        key: the run's key; the key of each step is folded in from it.
        step: the number of steps taken.
    """

    params: Params
    opt_state: State
    estimator_state: State
    key: Key
    step: Int[Array, ""]


class Step(eqx.Module):
    """All that one step can see, for `record` to keep what it wants of it.

    Attributes:
        step: the number of steps taken before this one.
        key: this step's key.
        params, opt_state: as this step found them; `loss` and `grads` were taken at `params`.
        estimator_state: as this step leaves it.
        loss, grads, dropped: the estimate.
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
    """Returns the state before the first step.

    Args:
        estimator: a task, or an estimator of a meta-gradient.
        optimizer: any Optax optimizer.
        params: a pytree of floating-point arrays.
        key: the key of the whole run, from `jax.random.key`.

    Raises:
        TypeError: if a leaf of `params` is not a floating-point array, or `key` is not a key.
    """
    check_key("start", key)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(
                f"start(params): the leaf {jax.tree_util.keystr(path) or 'params'} has dtype "
                f"{jnp.result_type(leaf)}; params must be floating-point arrays, try "
                "equinox.partition(model, equinox.is_inexact_array)[0]."
            )
    # A weakly typed leaf would become strongly typed after one step and be traced twice.
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), params)
    # Steps fold 0, 1, 2, ... into the key; this is none of them, and free if it is not used.
    prepare_key = jax.random.fold_in(key, 2**32 - 1)
    return TrainState(
        params=params,
        opt_state=optimizer.init(params),
        estimator_state=estimator.prepare(params, prepare_key),
        key=key,
        step=jnp.zeros((), jnp.int32),
    )


@eqx.filter_jit
def unroll(
    estimator: AbstractGradientEstimator,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    num_steps: int,
    *,
    record: Callable[[Step], Any] = loss_of,
    at_once: int = 1,
    segments: int = 1,
) -> tuple[TrainState, Record]:
    """Takes `num_steps` steps of training.

    With g, s' = estimator(params, s) and u, o' = optimizer(g, o, params), one step is
    params' = params + u. Splitting a run changes nothing: `m + n` steps equal `m` steps followed
    by `n`. Steps are rematerialised under reverse-mode differentiation, so that its memory grows
    by one training state per step and not by one network evaluation.

    Args:
        estimator: a task, or an estimator of a meta-gradient.
        optimizer: any Optax optimizer; it is passed the loss as `value`.
        state: from `start`, or from an earlier `unroll`.
        num_steps: at least 1; a Python integer.
        record: what to keep of each step, a function from `Step` to any pytree of arrays.
        at_once: of up to how many steps the records are computed together, after the last of them,
            by `jax.vmap`: of the largest divisor of the number of steps (per segment) that is not
            above it. A step of a small network takes some 35 microseconds, and a record of many
            small operations may add half of that; of fifty steps at once, it adds a quarter.
            Memory holds what `record` looks at, of so many steps. Results differ by rounding, and
            where a record has a `jax.lax.cond`, both of its branches are computed.
        segments: into how many equal parts the steps are cut for reverse-mode differentiation. Of
            each part only the first state is kept, so that memory holds `segments` +
            `num_steps / segments` states instead of `num_steps`, least at the square root, for
            another half of the time (Griewank & Walther 2000). With 0 every matrix product is
            kept, and only the elementwise work between them is done twice. Results do not depend
            on it.

    Returns:
        The state after the last step, and what was recorded, with a leading axis of length
        `num_steps` on every array.

    Raises:
        ValueError: if `num_steps` or `at_once` is not a positive integer, or `segments` does not
            divide `num_steps`.
    """
    check_integer("unroll", "num_steps", num_steps, hint=100)
    check_integer("unroll", "at_once", at_once, hint=50)
    check_segments("unroll", segments, "num_steps", num_steps)
    optimizer = optax.with_extra_args_support(optimizer)
    length = num_steps // max(segments, 1)
    window = max(size for size in range(1, min(at_once, length) + 1) if length % size == 0)

    def one_step(state: TrainState, key: Key) -> tuple[TrainState, Any]:
        estimate, estimator_state = estimator.estimate(state.params, state.estimator_state, key)
        updates, opt_state = optimizer.update(
            estimate.grads, state.opt_state, state.params, value=estimate.loss
        )
        step = Step(
            step=state.step,
            key=key,
            params=state.params,
            opt_state=state.opt_state,
            estimator_state=estimator_state,
            loss=estimate.loss,
            grads=estimate.grads,
            updates=updates,
            dropped=estimate.dropped,
        )
        seen = record(step) if window == 1 else step
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, estimator_state, state.key, state.step + 1), seen

    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names(KEPT)
    if not segments:
        # What lies between matrix products is computed again sooner than it is fetched from memory.
        policy = policies.save_from_both_policies(policy, policies.dots_saveable)
    one_step = jax.checkpoint(one_step, prevent_cse=False, policy=policy)

    def keyed_step(state: TrainState) -> tuple[TrainState, Any]:
        return one_step(state, jax.random.fold_in(state.key, state.step))

    def run(state: TrainState) -> tuple[TrainState, Record]:
        if window == 1:
            return _repeat(keyed_step, state, length)
        return _repeat(
            lambda s: _watched(keyed_step, record, s, window), state, length // window, of_many=True
        )

    if segments < 2:
        return run(state)
    return _repeat(jax.checkpoint(run, prevent_cse=False), state, segments, of_many=True)


def _repeat(
    function: Callable[[TrainState], tuple[TrainState, Record]],
    state: TrainState,
    times: int,
    *,
    of_many: bool = False,
) -> tuple[TrainState, Record]:
    """Calls a function some times, one after another, and stacks what it records."""
    state, records = jax.lax.scan(lambda state, _: function(state), state, length=times)
    if of_many:
        records = jax.tree.map(lambda r: r.reshape(times * r.shape[1], *r.shape[2:]), records)
    return state, records


def _watched(
    one_step: Callable[[TrainState], tuple[TrainState, Step]],
    record: Callable[[Step], Any],
    state: TrainState,
    steps: int,
) -> tuple[TrainState, Record]:
    """Takes some steps, and then computes the records of all of them."""

    def after(state: TrainState) -> tuple[TrainState, Any]:
        # Keeping what the next step overwrites would mean a copy, so what replaces it is kept.
        state, step = one_step(state)
        return state, (step, (state.params, state.opt_state))

    first = state.params, state.opt_state
    state, (seen, rest) = _repeat(after, state, steps)
    before = jax.tree.map(lambda a, b: jnp.concatenate([jnp.asarray(a)[None], b[:-1]]), first, rest)

    def recorded(step: Step, before: tuple[Params, State]) -> Record:
        params, opt_state = before
        return record(dataclasses.replace(step, params=params, opt_state=opt_state))

    recorded = jax.checkpoint(recorded, prevent_cse=False)
    return state, jax.vmap(recorded)(seen, before)


def check_segments(name: str, segments: int, what: str, steps: int) -> None:
    """Refuses a number of checkpoint segments that is neither 0 nor a divisor of `steps`."""
    plain = isinstance(segments, int) and not isinstance(segments, bool)
    if not plain or segments < 0 or (segments and steps % segments):
        divisors = (d for d in range(1, steps + 1) if not steps % d)
        raise ValueError(
            f"{name}(segments={segments!r}) must divide {what}={steps}, or be 0; "
            f"try {min(divisors, key=lambda d: d + steps // d)}."
        )
