"""Networks that see all tensors at once, and control the rule of each tensor's coordinates.

A controller makes a summary of each tensor; its network turns those, and a memory of each tensor,
into controls; and these decide how the tensor is updated. Tensors of one shape share a program.
VeLO, the hierarchical optimizers and NNAdam are controllers.
"""

import abc
import itertools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core import tensors
from lopt.core.learned import AbstractLearnedOptimizer, Columns, Tensor
from lopt.core.types import Key, NumSteps, Params, Scalar, State, Theta
from lopt.learned.recurrent import affine, lstm_cell

Summaries = Float[Array, "_feature tensor"]
Memory = tuple[Float[Array, "..."], Float[Array, "..."]]


class Reports(eqx.Module):
    """What an optimizer is told at a step: steps taken, losses, and how many tensors there are."""

    step: Int[Array, ""]
    value: Scalar | None
    validation_loss: Scalar | None
    tensors: int = eqx.field(static=True)


class AbstractController(eqx.Module):
    """A network per tensor. What is said of one tensor has no axis of tensors."""

    @abc.abstractmethod
    def init(self, key: Key) -> Theta:
        """Returns initial weights."""

    @abc.abstractmethod
    def begin(self, theta: Theta, param: Tensor) -> State:
        """Returns the accumulators of a tensor, any pytree; refuses ranks that it does not know."""

    @abc.abstractmethod
    def remember(self, theta: Theta) -> State:
        """Returns the memory of a tensor before the first step: a pytree of vectors."""

    @abc.abstractmethod
    def start(self, theta: Theta, num_steps: NumSteps, dtype: Any) -> State:
        """Returns the state that tensors share before the first step."""

    @abc.abstractmethod
    def prepare(
        self, theta: Theta, grads: list[Tensor], shared: State, reports: Reports
    ) -> tuple[Any, State]:
        """Returns what all tensors are told at a step, and the next shared state."""

    @abc.abstractmethod
    def observe(
        self, theta: Theta, grad: Tensor, own: State, param: Tensor, told: Any
    ) -> tuple[Any, Float[Array, " _feature"]]:
        """Returns views of a tensor, which `act` is given, and its summary."""

    @abc.abstractmethod
    def control(
        self, theta: Theta, summaries: Summaries, memory: State, shared: State
    ) -> tuple[Any, State, State]:
        """Returns controls, next memories and shared state; tensors are on the last axis."""

    @abc.abstractmethod
    def act(
        self, theta: Theta, views: Any, control: Any, param: Tensor, told: Any
    ) -> tuple[Tensor, State]:
        """Returns the update of a tensor, and its next accumulators."""

    @property
    def needs_num_steps(self) -> bool:
        """Whether it has to be told the length of the run."""
        return False


class TensorwiseState(eqx.Module):
    """The number of steps; what each tensor has, in trees like params; and what they share."""

    step: Int[Array, ""]
    own: State
    memory: State
    shared: State


class Tensorwise(AbstractLearnedOptimizer):
    """An optimizer whose updates a network per tensor controls.

    Theta is that of the controller. Arithmetic is at least float32. Leaves without a gradient
    (None) have no update, and keep their state.
    """

    controller: AbstractController

    @property
    @override
    def needs_num_steps(self) -> bool:
        return self.controller.needs_num_steps

    @override
    def init(self, key: Key) -> Theta:
        return self.controller.init(key)

    @override
    def begin(self, theta: Theta, params: Params, num_steps: NumSteps = None) -> TensorwiseState:
        leaves, structure = jax.tree.flatten(params)
        leaves = [tensors.as_tensor(leaf) for leaf in leaves]
        theta, dtype = cast(theta, _widest(leaves)), _widest(leaves)
        some = leaves or [jnp.zeros((1,), dtype)]
        own = [self.controller.begin(cast(theta, leaf.dtype), leaf) for leaf in some]
        memory, count = self.controller.remember(theta), len(leaves)
        return TensorwiseState(
            jnp.zeros((), jnp.int32),
            tensors.mirror(own[:count], own[0], structure),
            tensors.mirror([memory] * count, memory, structure),
            self.controller.start(theta, num_steps, dtype),
        )

    @override
    def update(
        self,
        theta: Theta,
        grads: Params,
        state: TensorwiseState,
        params: Params | None = None,
        *,
        value: Scalar | None = None,
        **extra: Any,
    ) -> tuple[Params, TensorwiseState]:
        if params is None:
            raise ValueError("Tensorwise.update(params=None): summaries see params; pass them.")
        leaves, structure = jax.tree.flatten(params)
        param = [tensors.as_tensor(leaf) for leaf in leaves]
        slopes = structure.flatten_up_to(grads)
        groups = _by_shape(param, slopes)
        order = [i for group in groups for i in group]
        if not order:
            zeros = jax.tree.map(jnp.zeros_like, grads)
            return zeros, eqx.tree_at(lambda s: s.step, state, state.step + 1)
        dtype = _widest(param)
        wide, slope = cast(theta, dtype), {i: tensors.as_tensor(slopes[i]) for i in order}
        reports = Reports(state.step, value, extra.get("validation_loss"), len(order))
        told, shared = self.controller.prepare(
            wide, [slope[i].astype(dtype) for i in order], state.shared, reports
        )
        own = tensors.unmirror(state.own, structure)
        seen = [
            self._observe(theta, told, _stack([(slope[i], own[i], param[i]) for i in group]))
            for group in groups
        ]
        summaries = jnp.concatenate([summary.astype(dtype) for _, summary in seen]).T
        memories = tensors.unmirror(state.memory, structure)
        memory = jax.tree.map(
            lambda *vectors: jnp.stack(vectors, -1), *(memories[i] for i in order)
        )
        control, memory, shared = self.controller.control(wide, summaries, memory, shared)
        updates: list[Any] = [None if g is None else jnp.zeros_like(g) for g in slopes]
        for k, i in enumerate(order):
            memories[i] = jax.tree.map(lambda vectors, k=k: vectors[..., k], memory)
        ends = itertools.pairwise(itertools.accumulate(map(len, groups), initial=0))
        for group, (views, _), (first, last) in zip(groups, seen, ends, strict=True):
            stack = _stack([param[i] for i in group])
            mine = jax.tree.map(
                lambda c, i=first, j=last: jnp.moveaxis(c[..., i:j], -1, 0), control
            )
            update, new = self._act(theta, told, (views, cast(mine, stack.dtype), stack))
            for k, i in enumerate(group):
                updates[i] = update[k].astype(leaves[i].dtype)
                own[i] = jax.tree.map(lambda array, k=k: array[k], new)
        own, memories = (tensors.mirror(s, s[0], structure) for s in (own, memories))
        new_state = TensorwiseState(state.step + 1, own, memories, shared)
        return structure.unflatten(updates), new_state

    def _observe(self, theta: Theta, told: Any, stack: Any) -> tuple[Any, Float[Array, "t _f"]]:
        """Returns views and summaries of a stack of tensors."""
        theta, told = cast((theta, told), stack[2].dtype)

        def one(grad: Tensor, own: State, param: Tensor) -> Any:
            return self.controller.observe(theta, grad.astype(param.dtype), own, param, told)

        return tensors.map_stack(one, stack, _is_large(stack[2]))

    def _act(self, theta: Theta, told: Any, stack: Any) -> tuple[Tensor, State]:
        """Returns updates and next accumulators of a stack of tensors."""
        theta, told = cast((theta, told), stack[2].dtype)

        def one(views: Any, control: Any, param: Tensor) -> tuple[Tensor, State]:
            return self.controller.act(theta, views, control, param, told)

        return tensors.map_stack(one, stack, _is_large(stack[2]))


class TensorLSTM(eqx.Module):
    """An LSTM over summaries, each tensor with its own memory, and linear outputs.

    Attributes:
        inputs, hidden: the number of summaries, and the width.
        heads: name and width of each output.
        mix: whether tensors see one another: the LSTM then reads L x + max over tensors of
            relu(M x), and not x.

    Weights start truncated normal, at two standard deviations of 1 / sqrt(fan in); biases at zero
    but those of forget gates, at one. The first memory is learned.
    """

    inputs: int = eqx.field(static=True)
    hidden: int = eqx.field(static=True)
    heads: tuple[tuple[str, int], ...] = eqx.field(static=True)
    mix: bool = eqx.field(static=True, default=False)

    def init(self, key: Key) -> Theta:
        """Returns `{"cell": {"w", "b"}, "memory": (output, cell), name: {"w", "b"}, ...}`."""
        read = self.hidden if self.mix else self.inputs
        sizes = {"cell": (4 * self.hidden, read + self.hidden)}
        sizes |= {name: (width, self.hidden) for name, width in self.heads}
        if self.mix:
            sizes |= dict.fromkeys(("input", "mix"), (self.hidden, self.inputs))
        theta: dict[str, Any] = {
            name: {"w": truncated_normal(own, shape), "b": jnp.zeros(shape[0])}
            for own, (name, shape) in zip(
                jax.random.split(key, len(sizes)), sizes.items(), strict=True
            )
        }
        forget = slice(self.hidden, 2 * self.hidden)
        theta["cell"]["b"] = theta["cell"]["b"].at[forget].set(1.0)
        return theta | {"memory": (jnp.zeros(self.hidden), jnp.zeros(self.hidden))}

    def apply(
        self, theta: Theta, summaries: Summaries, memory: Memory
    ) -> tuple[dict[str, Summaries], Memory]:
        """Returns the outputs by name, and the next memory, for each tensor."""
        if self.mix:
            mixed = jax.nn.relu(affine(theta["mix"], summaries))
            summaries = affine(theta["input"], summaries) + jnp.max(mixed, -1, keepdims=True)
        memory = lstm_cell(theta["cell"], summaries, memory)
        return {name: affine(theta[name], memory[0]) for name, _ in self.heads}, memory


def on_coordinates(
    columns: Callable[[Any], tuple[Columns, ...]],
    views: Any,
    param: Tensor,
    rule: Callable[[Columns], Any],
) -> Any:
    """Returns what a rule makes of columns, each over its root mean square, a slab at a time.

    Scalars that the rule returns are summed over coordinates.
    """

    def rows(arguments: Any) -> Columns:
        views, like = arguments
        stacks = columns(views)
        return jnp.concatenate([jnp.broadcast_to(s, (len(s), *like.shape)) for s in stacks])

    def sums(arguments: Any) -> tuple[Scalar, ...]:
        return tuple(jnp.sum(jnp.square(rows(arguments)), tuple(range(1, param.ndim + 1))))

    totals = jnp.stack(tensors.map_blocks(sums, (views, param), param.shape))
    factors = jax.lax.rsqrt(1e-5 + totals / param.size).reshape(-1, *(1,) * param.ndim)
    return tensors.map_blocks(lambda a: rule(rows(a) * factors), (views, param), param.shape)


def clipped_log(x: Array) -> Array:
    """Returns log(1e-8 + |x|), at most 5 and at least -5."""
    return jnp.clip(jnp.log(1e-8 + jnp.abs(x)), -5, 5)


def variance(bank: Array, about: Array | None = None) -> Array:
    """Returns the mean over coordinates of (x - about)^2, about the mean, for each of a bank."""
    axes = tuple(range(1, bank.ndim))
    about = jnp.mean(bank, axes, keepdims=True) if about is None else about
    return jnp.mean(jnp.square(bank - about), axes)


def truncated_normal(key: Key, shape: tuple[int, int]) -> Tensor:
    """Returns weights, outputs first, of a standard deviation of about 1 / sqrt(fan in)."""
    return jax.random.truncated_normal(key, -2.0, 2.0, shape) / shape[1] ** 0.5


def loss_of(owner: object, reports: Reports, dtype: Any) -> Scalar:
    """Returns the training loss, which `owner` needs."""
    if reports.value is None:
        raise ValueError(
            f"{type(owner).__name__} needs the training loss; try "
            "optimizer.update(grads, state, params, value=loss)."
        )
    return jnp.asarray(reports.value).astype(dtype)


def cast(tree: Any, dtype: Any) -> Any:
    """Returns a pytree with its arrays of floats in a dtype."""
    floats, others = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(lambda leaf: leaf.astype(dtype), floats), others)


def _widest(leaves: list[Tensor]) -> Any:
    dtypes = (leaf.dtype for leaf in leaves)
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))


def _by_shape(param: list[Tensor], slopes: list[Any]) -> list[list[int]]:
    """Returns the numbers of the tensors with a gradient, grouped by shape and dtype."""
    groups: dict[Any, list[int]] = {}
    for i, (p, slope) in enumerate(zip(param, slopes, strict=True)):
        if slope is not None and p.size:
            groups.setdefault((p.shape, p.dtype), []).append(i)
    return list(groups.values())


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


def _is_large(stack: Tensor) -> bool:
    return stack[0].size > tensors.BLOCK_SIZE
