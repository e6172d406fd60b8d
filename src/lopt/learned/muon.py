"""A learned rule that starts at Muon (Jordan et al. 2024) and contains it.

Matrices move along an orthogonalised direction, which a small network makes of gradient and
momenta; vectors and embeddings along a direction that starts at Adam's. Whatever changes its sign
with the gradient enters linearly or through odd units; whatever does not, only as a factor.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from typing_extensions import override

from lopt.core import tensors
from lopt.core.learned import AbstractLearnedOptimizer, Tensor
from lopt.core.types import Key, NumSteps, Params, Scalar, State, Theta, as_pytree
from lopt.learned.hypernetwork import cast, widest
from lopt.learned.matrices import COEFFICIENTS, MatrixAxes, View, orthogonalised
from lopt.learned.schedules import Time

KINDS = ("matrix", "kernel", "vector", "embedding")
FEATURES = ("g", "n", "s", "g/root", "n/root", "s/root", "n/factored")
FACTORS = ("one", "progress", "early", "length", "depth", "agreement", "signal", "weight", "fit")
ADAM = 0.2  # the rate of vectors, in rates of matrices
LARGE = 2**20  # numbers in a tensor
DEEPEST = 12  # matrices: deeper networks count as this deep
# Added to second moments: gradients far above its root, 1e-12, give updates that do not depend on
# their scale, and the derivative of the reciprocal root is finite in float32 where they vanish.
TINY = 1e-24
# Estimators perturb all weights alike. One that changes steps by 1 % is lost in their noise, one
# that changes Newton and Schulz's coefficients by more makes the iteration diverge.
PER_SIZE, PER_COEFFICIENT = 3.0, 0.1


class MuonMLPState(eqx.Module):
    """Where the run is, and the accumulators: 12 bytes a weight in float32, trees like params.

    Attributes:
        fast, slow, squares: averages of gradients, and of their squares.
        norm, peak: an average of the squared norm of all gradients, and the largest so far.
    """

    time: Time
    fast: Params
    slow: Params
    squares: Params
    norm: Scalar
    peak: Scalar


class MuonMLP(AbstractLearnedOptimizer):
    """Muon with a learned direction, learned sizes of steps and a learned schedule.

    With bias-corrected averages m and s of the gradient g and v of its square, and Nesterov's
    n = b m + (1 - b) g, the features f of a tensor are g, n and s, the same over the root of v, and
    n over that of the factored v; each over its root mean square. The factors c of a tensor are
    even in g: progress and length of the run, depth up to 12, agreement of g and s, signal over
    noise, size of the weights, and fit: from 0, where gradients are at their largest, to -3 at a
    thousandth of it. The update is -rate (exp(S c) D(d) + decay exp(E c) p), with

        d = sum_i (A c)_i f_i + sum_j (G c)_j tanh((W f)_j).

    For matrices D is Newton and Schulz's iteration times max(1, out / in)^a min(1, out / in)^b: a
    half and zero at first, as in Muon; muP has a half for both. For vectors and embeddings it is
    1 / 5, and features over the root of v are as they are. A picks n, or n over the root, at first,
    and all else is zero: `optax.contrib.muon(rate, adam_learning_rate=rate / 5)`.

    Updates are odd in g, do not depend on its scale, and follow permutations and transposes.

    Attributes:
        hidden: the number of odd units.
        learning_rate: a number or a schedule of the step, in place of the learned one. Without it
            the length of the run is needed, and nothing has to be tuned. That of `optimizer` is a
            factor of either.
        weight_decay: decoupled, per step and unit of the rate, times a learned factor.
        weight_decay_mask: from params to a tree of booleans, what decays; by default matrices do.
        axes: from params to a tree of `optax.contrib.MuonDimensionNumbers`, None for no matrix.
        peak: the largest rate of the schedule that is learned on from.
        warmup: the share of the run in which it rises.
    """

    hidden: int = eqx.field(static=True, default=8)
    learning_rate: Any = eqx.field(
        default=None, converter=lambda r: as_pytree(r) if callable(r) else r
    )
    weight_decay: float | Scalar = 0.0
    weight_decay_mask: Callable[[Params], Any] | None = eqx.field(static=True, default=None)
    axes: Callable[[Params], Any] = eqx.field(static=True, default=MatrixAxes())
    peak: float = eqx.field(static=True, default=0.05)
    warmup: float = eqx.field(static=True, default=0.05)

    @property
    @override
    def needs_num_steps(self) -> bool:
        return self.learning_rate is None

    @override
    def init(self, key: Key) -> Theta:
        def rule(key: Key, start: str, decays: tuple[float, float, float]) -> Theta:
            inputs, factors = len(FEATURES), len(FACTORS)
            return {
                "linear": jnp.zeros((inputs, factors)).at[FEATURES.index(start), 0].set(1.0),
                "odd": 0.3 * jax.random.normal(key, (self.hidden, inputs)),
                "gates": jnp.zeros((self.hidden, factors)),
                "log_one_minus_decays": jnp.log(1 - jnp.asarray(decays, float)),
            }

        keys = jax.random.split(key)
        return {
            "matrix": rule(keys[0], "n", (0.95, 0.99, 0.95)),
            "vector": rule(keys[1], "n/root", (0.9, 0.99, 0.999)),
            "sizes": {kind: jnp.zeros(len(FACTORS)) for kind in KINDS},
            "decay": jnp.zeros(len(FACTORS)),
            "fans": jnp.asarray([0.5, 0.0], float),
            "coefficients": jnp.zeros(3),
            "schedule": jnp.zeros(9),
        }

    @override
    def begin(self, theta: Theta, params: Params, num_steps: NumSteps = None) -> MuonMLPState:
        def zeros() -> Params:  # arrays of their own, so that they may be donated
            return jax.tree.map(lambda leaf: jnp.zeros_like(tensors.as_tensor(leaf)), params)

        dtype = widest([tensors.as_tensor(leaf) for leaf in jax.tree.leaves(params)])
        norms = jnp.zeros((), dtype), jnp.zeros((), dtype)
        return MuonMLPState(Time.of(0, num_steps), zeros(), zeros(), zeros(), *norms)

    @override
    def update(
        self,
        theta: Theta,
        grads: Params,
        state: MuonMLPState,
        params: Params | None = None,
        *,
        value: Scalar | None = None,
        **extra: Any,
    ) -> tuple[Params, State]:
        structure, views, depth, stacks, averages = self._stacks(theta, grads, state, params)
        *norms, fit = _fit(state, grads)
        leaves = jax.tree.leaves(params)
        decays = [view.order != () for view in views]
        if self.weight_decay_mask is not None:
            decays = structure.flatten_up_to(self.weight_decay_mask(params))
        rate = self.rate(theta, state.time, depth)
        groups: dict[Any, list[int]] = {}
        for i, (view, stack) in enumerate(zip(views, stacks, strict=True)):
            key = view.kind, view.sizes[1:], view.fan_in, stack[1].dtype, bool(decays[i])
            groups.setdefault(key, []).append(i)
        done: list[Any] = [None] * len(leaves)
        for same in groups.values():
            decay = self.weight_decay if decays[same[0]] else 0.0
            one = _Tensor(theta, state.time, depth, fit, views[same[0]], rate, decay)
            group = tensors.concatenate([stacks[i] for i in same])
            # Features of large tensors do not all exist at once.
            moved = tensors.map_stack(one, group, math.prod(views[same[0]].sizes[1:]) > LARGE)
            parts = tensors.divide(moved, [views[i].sizes[0] for i in same])
            for i, part in zip(same, parts, strict=True):
                done[i] = views[i].unstack(part).astype(leaves[i].dtype)
        return structure.unflatten(done), MuonMLPState(state.time.next(), *averages, *norms)

    def mixtures(
        self, theta: Theta, grads: Params, state: MuonMLPState, params: Params
    ) -> list[tuple[str, tuple[Tensor, Array, list[Tensor]]]]:
        """Returns the kind of each tensor, "matrix" or "vector", and what a step mixes for it.

        That is the mix, the `FACTORS` and the `FEATURES`, of vectors without the last; all for each
        in the stack.
        """
        _, views, depth, stacks, _ = self._stacks(theta, grads, state, params)
        found, fit = [], _fit(state, grads)[-1]
        for view, stack in zip(views, stacks, strict=True):
            one = _Tensor(theta, state.time, depth, fit, view, jnp.zeros(()), 0.0)
            kind = "matrix" if view.order else "vector"
            found.append((kind, jax.vmap(one.mixed)(*stack)))
        return found

    def without_network(self, theta: Theta, linear: dict[str, Array]) -> tuple["MuonMLP", Theta]:
        """Returns the rule that mixes features linearly alone, by these matrices A, and theta."""
        short, found = dataclasses.replace(self, hidden=0), dict(theta)
        for kind in ("matrix", "vector"):
            mix = linear.get(kind, theta[kind]["linear"])
            inputs, factors = mix.shape
            network = {"odd": jnp.zeros((0, inputs)), "gates": jnp.zeros((0, factors))}
            found[kind] = {**theta[kind], **network, "linear": mix}
        return short, found

    def _stacks(
        self, theta: Theta, grads: Params, state: MuonMLPState, params: Params
    ) -> tuple[Any, ...]:
        """Returns what belongs to each leaf, as a stack of tensors, and the next averages."""
        structure: Any
        slopes = tensors.gradients(grads, params)
        leaves, structure = jax.tree.flatten(params)
        axes = structure.flatten_up_to(self.axes(params))
        views = [View.of(leaf, numbers) for leaf, numbers in zip(leaves, axes, strict=True)]
        depth = max(1, sum(view.sizes[0] for view in views if view.order))
        olds = tensors.unmirror((state.fast, state.slow, state.squares), structure)
        stacks, news = [], []
        for view, leaf, slope, old in zip(views, leaves, slopes, olds, strict=True):
            grad = tensors.as_tensor(slope)
            # Not in stacks: a sharded leaf has averages that are sharded as it is.
            logs = theta["matrix" if view.order else "vector"]["log_one_minus_decays"]
            rows = zip(
                jnp.exp(logs.astype(grad.dtype)), old, (grad, grad, grad * grad), strict=True
            )
            news.append(tuple(a + share * (x - a) for share, a, x in rows))
            stacks.append(tuple(map(view.stack, (grad, tensors.as_tensor(leaf), *news[-1]))))
        averages = tensors.mirror(news, (0, 0, 0), structure)
        return structure, views, depth, stacks, averages

    def rate(self, theta: Theta, time: Time, depth: int = 1) -> Scalar:
        """Returns the size of the step at a time, for a network of `depth` matrices."""
        dtype = theta["schedule"].dtype
        if self.learning_rate is not None:
            given = self.learning_rate
            return jnp.asarray(given(time.step) if callable(given) else given, dtype)
        assert time.num_steps is not None  # `optimizer` asks for it
        run = _of_run(time, depth, dtype)
        _, done, _, length, deep = run
        share = done + 0.5
        rise = jnp.minimum((share + 1 / time.num_steps.astype(dtype)) / self.warmup, 1)
        fall = (1 + jnp.cos(math.pi * jnp.clip(share - self.warmup, 0) / (1 - self.warmup))) / 2
        fall = jnp.where(share < 1, fall, 0)
        time_alone = [done * done, jnp.log(jnp.maximum(fall, 1e-6)) / 4]
        basis = jnp.stack([*run, *time_alone, done * length, done * deep])
        return self.peak * rise * fall * jnp.exp(PER_SIZE * jnp.dot(theta["schedule"], basis))


class _Tensor(eqx.Module):
    """The update of one tensor of a kind."""

    theta: Theta
    time: Time
    depth: int
    fit: Scalar
    view: View
    rate: Scalar
    decay: float | Scalar

    def __call__(self, grad: Tensor, param: Tensor, *averages: Tensor) -> Tensor:
        direction, factors, _ = self.mixed(grad, param, *averages)
        theta, dtype = self._theta(grad.dtype), grad.dtype
        size = jnp.exp(PER_SIZE * jnp.dot(theta["sizes"][self.view.kind], factors))
        if self.view.order:
            growth = math.log(self.view.fan_out / self.view.fan_in)
            size = size * jnp.exp(theta["fans"][0 if growth > 0 else 1] * growth)
            coefficients = jnp.asarray(COEFFICIENTS, dtype)
            coefficients = coefficients * (1 + PER_COEFFICIENT * theta["coefficients"])
            direction = orthogonalised(direction, coefficients)
        else:
            size = size * ADAM
        decay = self.decay * jnp.exp(PER_SIZE * jnp.dot(theta["decay"], factors))
        update = size * direction + decay.astype(dtype) * param
        return -self.rate.astype(dtype) * update

    def mixed(
        self, grad: Tensor, param: Tensor, fast: Tensor, slow: Tensor, squares: Tensor
    ) -> tuple[Tensor, Array, list[Tensor]]:
        """Returns the mix of features, the factors and the features."""
        rule = self._theta(grad.dtype)["matrix" if self.view.order else "vector"]
        logs = rule["log_one_minus_decays"]
        count = (self.time.step + 1).astype(grad.dtype)
        old = jnp.exp(logs)

        def corrected(average: Tensor, i: int, count: Scalar = count) -> Tensor:
            # 1 - decay^count, without the loss of digits of a decay close to one.
            return average / -jnp.expm1(count * jnp.log1p(-old[i]))

        nesterov = (1 - old[0]) * corrected(fast, 0, count + 1) + old[0] * corrected(grad, 0)
        late, variance = corrected(slow, 1), corrected(squares, 2)
        over_root = jax.lax.rsqrt(variance + TINY)
        plain = [_unit(x) for x in (grad, nesterov, late)]
        scaled = [x * over_root for x in (grad, nesterov, late)]
        if self.view.order:
            rows, columns = (jnp.mean(variance, axis, keepdims=True) for axis in (1, 0))
            rows = rows / (jnp.mean(rows) + TINY)
            over_factored = jax.lax.rsqrt(rows + TINY) * jax.lax.rsqrt(columns + TINY)
            scaled = [_unit(x) for x in (*scaled, nesterov * over_factored)]
        features = [*plain, *scaled]
        factors = self._factors(plain, nesterov, variance, param)
        linear, gates = (rule[name] @ factors for name in ("linear", "gates"))
        direction = _as_sums(linear, gates, rule["odd"], features)
        return direction, factors, features

    def _theta(self, dtype: Any) -> Theta:
        return jax.tree.map(lambda weight: weight.astype(dtype), self.theta)

    def _factors(
        self, plain: list[Tensor], nesterov: Tensor, variance: Tensor, param: Tensor
    ) -> Float[Array, " factor"]:
        """Returns what is even in the gradient; each is about between -1 and 1."""
        signal = jnp.log((jnp.mean(nesterov**2) + TINY) / (jnp.mean(variance) + TINY)) / 4
        # Zero for weights that were drawn with a standard deviation of 1 / sqrt(fan in).
        weight = jnp.log(jnp.mean(param * param) * self.view.fan_in + 1e-6) / 6
        own = jnp.mean(plain[0] * plain[2]), jnp.maximum(signal, -2), jnp.minimum(weight, 2)
        run, fit = _of_run(self.time, self.depth, param.dtype), self.fit.astype(param.dtype)
        return jnp.stack([*run, *own, fit])


def _of_run(time: Time, depth: int, dtype: Any) -> tuple[Scalar, ...]:
    """Returns the factors that all tensors share: the first of `FACTORS`.

    Where the length is not known they are those in the middle of a thousand steps.
    """
    done, length = jnp.full((), 0.5, dtype), jnp.zeros((), dtype)
    if time.num_steps is not None:
        steps = time.num_steps.astype(dtype)
        done, length = time.step.astype(dtype) / steps, jnp.log(steps / 1000) / 2
    deep = jnp.asarray(math.log(min(depth, DEEPEST) / 2) / 2, dtype)
    return jnp.ones((), dtype), done - 0.5, jnp.exp(-10 * done), length, deep


def _fit(state: MuonMLPState, grads: Params) -> tuple[Scalar, Scalar, Scalar]:
    """Returns the next `norm` and `peak` of a state, and the last of `FACTORS`.

    That is zero at the peak, and -1/3, -4/3 and -3 at a tenth, a hundredth and a thousandth of it.
    """
    dtype = state.norm.dtype
    square = optax.tree.norm(cast(grads, dtype), squared=True)
    norm = 0.9 * state.norm + 0.1 * square
    now = norm / (1 - 0.9 ** (state.time.step + 1).astype(dtype))
    # One outlier is no peak.
    peak = jnp.where(state.peak > 0, jnp.clip(now, state.peak, 1.1 * state.peak), now)
    fall = jnp.minimum(jnp.log((now + TINY) / (peak + TINY)) / 8, 0)
    return norm, peak, -jnp.minimum(fall * fall, 3)


@jax.custom_jvp
def _as_sums(linear: Array, gates: Array, odd: Array, features: list[Tensor]) -> Tensor:
    """Returns the mix of the features that there are: a quarter of the time of products."""

    def weighted(weights: Array, terms: list[Tensor]) -> Tensor:
        return sum(weight * term for weight, term in zip(weights, terms, strict=False))

    units = [jnp.tanh(weighted(weights, features)) for weights in odd]
    mix = weighted(linear, features)
    return mix + weighted(gates, units) if units else mix


@_as_sums.defjvp
def _(primals: Any, tangents: Any) -> tuple[Tensor, Tensor]:
    # Sums would take minutes to compile here.
    return jax.jvp(_as_products, primals, tangents)


def _as_products(linear: Array, gates: Array, odd: Array, features: list[Tensor]) -> Tensor:
    """Returns the same by products of matrices."""
    count, stack = len(features), jnp.stack(features)
    units = jnp.tanh(jnp.tensordot(odd[:, :count], stack, 1))
    return jnp.tensordot(linear[:count], stack, 1) + jnp.tensordot(gates, units, 1)


def _unit(x: Tensor) -> Tensor:
    """Returns a tensor over its root mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x * x) + TINY)


def muon_mlp(hidden: int = 8, learning_rate: Any = None, **fields: Any) -> MuonMLP:
    """The rule that starts at Muon, 447 weights: see `MuonMLP` for its fields."""
    return MuonMLP(hidden, learning_rate, **fields)
