"""Networks that see all tensors at once, and control the rule of each tensor's coordinates.

An LSTM reads a summary of each tensor, remembers each, and says how each is to be updated. Tensors
of one shape share a program. VeLO, the hierarchical optimizers and NNAdam are such controllers.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from typing_extensions import override

from lopt.core import tensors
from lopt.core.devices import is_sharded
from lopt.core.learned import AbstractLearnedOptimizer, Columns, Tensor
from lopt.core.types import Key, NumSteps, Params, Scalar, State, Theta
from lopt.learned.recurrent import affine, lstm_cell

Summaries = Float[Array, "_feature tensor"]
Memory = tuple[Float[Array, "..."], Float[Array, "..."]]


class TensorLSTM(eqx.Module):
    """An LSTM over summaries, each tensor with its own memory, and linear outputs.

    Attributes:
        inputs, hidden: the number of summaries, and the width.
        heads: name and width of each output.
        mix: whether tensors see one another: the LSTM then reads L x + max over tensors of
            relu(M x), and not x.
        remembers: whether it has a memory beyond the first one.

    Weights start truncated normal, at two standard deviations of 1 / sqrt(fan in); biases at zero
    but those of forget gates, at one. The first memory is learned, from zero.
    """

    inputs: int = eqx.field(static=True)
    hidden: int = eqx.field(static=True)
    heads: tuple[tuple[str, int], ...] = eqx.field(static=True)
    mix: bool = eqx.field(static=True, default=False)
    remembers: bool = eqx.field(static=True, default=True)

    def __check_init__(self) -> None:
        if min(self.inputs, self.hidden, *(width for _, width in self.heads)) < 1:
            raise ValueError(f"{self}: every layer must have at least one unit.")

    def init(self, key: Key) -> Theta:
        """Returns `{"cell": {"w", "b"}, "memory": (output, cell), name: {"w", "b"}, ...}`."""
        sizes = {name: (width, self.hidden) for name, width in self.heads}
        if self.mix:
            sizes |= dict.fromkeys(("input", "mix"), (self.hidden, self.inputs))
        sizes["cell"] = 4 * self.hidden, self.hidden + (self.hidden if self.mix else self.inputs)
        keys = dict(zip(sizes, jax.random.split(key, len(sizes)), strict=True))
        theta: dict[str, Any] = {
            name: {"w": truncated_normal(keys[name], shape), "b": jnp.zeros(shape[0])}
            for name, shape in sizes.items()
        }
        forget = slice(self.hidden, 2 * self.hidden)
        theta["cell"]["b"] = theta["cell"]["b"].at[forget].set(1.0)
        return theta | {"memory": (jnp.zeros(self.hidden), jnp.zeros(self.hidden))}

    def apply(
        self, theta: Theta, summaries: Summaries, memory: Memory
    ) -> tuple[dict[str, Summaries], Memory]:
        """Returns the outputs by name, and the next memory; tensors are on the last axis."""
        if self.mix:
            mixed = jax.nn.relu(affine(theta["mix"], summaries))
            summaries = affine(theta["input"], summaries) + jnp.max(mixed, -1, keepdims=True)
        new = lstm_cell(theta["cell"], summaries, memory)
        outputs = {name: affine(theta[name], new[0]) for name, _ in self.heads}
        return outputs, new if self.remembers else memory


class AbstractController(eqx.Module):
    """What an LSTM gets to see of each tensor, and what is done with what it says.

    Theta is a dictionary, with the weights of `network` under that name. What is said of a tensor
    is written for one, without an axis of tensors.
    """

    # Whether it has to be told the length of the run.
    needs_num_steps: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def network(self) -> TensorLSTM:
        """The network."""

    @abc.abstractmethod
    def init(self, key: Key) -> Theta:
        """Returns initial weights."""

    @abc.abstractmethod
    def begin(self, theta: Theta, param: Tensor) -> State:
        """Returns the accumulators of a tensor, any pytree; refuses ranks that it does not know."""

    @abc.abstractmethod
    def observe(self, theta: Theta, grad: Tensor, own: State, param: Tensor, told: Any) -> Any:
        """Returns views of a tensor, which `act` is given, and its summary, a vector."""

    @abc.abstractmethod
    def act(self, theta: Theta, views: Any, control: Any, param: Tensor, told: Any) -> Any:
        """Returns the update of a tensor, which `control` of the network decides, and its state."""

    def start(self, theta: Theta, num_steps: NumSteps, dtype: Any) -> State:
        """Returns the state that tensors share before the first step."""
        return ()

    def prepare(self, theta: Theta, grads: Any, shared: Any, step: Any, extra: Any) -> Any:
        """Returns what all tensors are told at a step, and the next shared state.

        `grads` is a list, and `extra` what `update` is given, such as the loss as its `value`.
        """
        return (), shared

    def share(self, control: Any, shared: State) -> State:
        """Returns the shared state after the network's outputs for all tensors."""
        return shared


class TensorwiseState(eqx.Module):
    """The number of steps; what each tensor has, in trees like params; and what they share."""

    step: Int[Array, ""]
    own: State
    memory: State
    shared: State


class Tensorwise(AbstractLearnedOptimizer):
    """An optimizer whose updates a network per tensor controls.

    Theta is that of the controller. Arithmetic is at least float32.
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
        theta, dtype = cast(theta, widest(leaves)), widest(leaves)
        some = leaves or [jnp.zeros((1,), dtype)]
        own = [self.controller.begin(cast(theta, leaf.dtype), leaf) for leaf in some]
        memory, count = theta["network"]["memory"], len(leaves)
        state = TensorwiseState(
            jnp.zeros((), jnp.int32),
            tensors.mirror(own[:count], own[0], structure),
            tensors.mirror([memory] * count, memory, structure),
            self.controller.start(theta, num_steps, dtype),
        )
        # What is donated must not have an array twice, nor one of theta or params.
        return jax.tree.map(jnp.copy, state)

    @override
    def update(
        self, theta: Theta, grads: Params, state: State, params: Params | None = None, **extra: Any
    ) -> tuple[Params, TensorwiseState]:
        slopes = tensors.gradients(grads, params)
        structure: Any
        leaves, structure = jax.tree.flatten(params)
        param = [tensors.as_tensor(leaf) for leaf in leaves]
        dtype, groups = widest(param), _by_shape(param)
        order = [i for group in groups for i in group]
        if not order:
            new_state = eqx.tree_at(lambda s: s.step, state, state.step + 1)
            return jax.tree.map(jnp.zeros_like, grads), new_state
        own, memory = (tensors.unmirror(part, structure) for part in (state.own, state.memory))
        wide = cast(theta, dtype)
        slope = {i: jnp.asarray(slopes[i]).astype(param[i].dtype) for i in order}
        told, shared = self.controller.prepare(
            wide, [slope[i].astype(dtype) for i in order], state.shared, state.step, extra
        )
        stacks = [
            jax.tree.map(lambda *a: jnp.stack(a), *((slope[i], own[i], param[i]) for i in group))
            for group in groups
        ]
        seen = [_map(self.controller.observe, theta, stack, told) for stack in stacks]
        summaries = jnp.concatenate([summary.astype(dtype) for _, summary in seen]).T
        remembered = jax.tree.map(lambda *m: jnp.stack(m, -1), *(memory[i] for i in order))
        control, remembered = self.controller.network.apply(wide["network"], summaries, remembered)
        shared = self.controller.share(control, shared)
        control, remembered = jax.tree.map(jnp.transpose, (control, remembered))
        updates = [jnp.zeros_like(leaf) for leaf in leaves]
        parts = tensors.divide((control, remembered), [*map(len, groups)])
        for group, (*_, params_of), (views, _), (mine, old) in zip(
            groups, stacks, seen, parts, strict=True
        ):
            update, new = _map(self.controller.act, theta, (views, mine, params_of), told)
            each = tensors.divide((update, new, old), [1] * len(group))
            for i, one in zip(group, each, strict=True):
                update, own[i], memory[i] = jax.tree.map(lambda array: array[0], one)
                updates[i] = update.astype(leaves[i].dtype)
        own, memory = (tensors.mirror(part, part[0], structure) for part in (own, memory))
        return structure.unflatten(updates), TensorwiseState(state.step + 1, own, memory, shared)


def _map(function: Callable[..., Any], theta: Theta, stack: Any, told: Any) -> Any:
    """Returns what a controller's method makes of each tensor of a stack, params being last."""
    theta, told = cast((theta, told), stack[-1].dtype)

    def one(*arrays: Any) -> Any:
        arrays = cast(arrays, stack[-1].dtype)
        return function(theta, *arrays, told)

    large = stack[-1][0].size > tensors.BLOCK_SIZE and not is_sharded(stack[-1])
    return tensors.map_stack(one, stack, large)


def on_coordinates(
    columns: Callable[[Any], tuple[Columns, ...]],
    views: Any,
    param: Tensor,
    rule: Callable[[Columns], Any],
) -> Any:
    """Returns what a rule makes of columns, each over its root mean square, a slab at a time.

    What the rule returns with axes of length one is summed over coordinates. A rule that has arrays
    is a pytree of them, such as `eqx.Partial`.
    """
    size = param.size if is_sharded(param) else tensors.BLOCK_SIZE
    cut = tensors.slabs_of(param.shape, size)
    squares, _ = tensors.in_slabs(eqx.Partial(_squares, columns), (views, param), (), *cut)
    factors = [jax.lax.rsqrt(1e-5 + square / param.size) for square in squares]
    work = eqx.Partial(_apply, columns, factors, rule)
    return tensors.in_slabs(work, (views, param), (), *cut)[0]


def _full(columns: Callable[..., Any], views: Any, like: Tensor) -> list[Columns]:
    return [jnp.broadcast_to(s, (len(s), *like.shape)) for s in columns(views)]


def _squares(columns: Callable[..., Any], seen: Any, kept: tuple[()]) -> tuple[Any, tuple[()]]:
    """Returns the sum over coordinates of the square of each feature."""
    stacks = _full(columns, *seen)
    return [jnp.sum(jnp.square(stack), range(1, stack.ndim)) for stack in stacks], kept


def _apply(
    columns: Callable[..., Any],
    factors: list[Tensor],
    rule: Callable[[Columns], Any],
    seen: Any,
    kept: tuple[()],
) -> tuple[Any, tuple[()]]:
    stacks = zip(_full(columns, *seen), factors, strict=True)
    scaled = [s * f.reshape(-1, *(1,) * (s.ndim - 1)) for s, f in stacks]
    return rule(jnp.concatenate(scaled)), kept


def clipped_log(x: Array) -> Array:
    """Returns log(1e-8 + |x|), at most 5 and at least -5."""
    return jnp.clip(jnp.log(1e-8 + jnp.abs(x)), -5, 5)


def truncated_normal(key: Key, shape: tuple[int, ...]) -> Tensor:
    """Returns weights, inputs last, of a standard deviation of about 1 / sqrt(fan in)."""
    return jax.random.truncated_normal(key, -2.0, 2.0, shape) / shape[-1] ** 0.5


def needed_loss(owner: str, value: Any, dtype: Any) -> Scalar:
    """Returns the training loss, or refuses a step without one."""
    if value is None:
        raise ValueError(
            f"{owner} needs the training loss; try "
            "optimizer.update(grads, state, params, value=loss)."
        )
    return jnp.asarray(value).astype(dtype)


def cast(tree: Any, dtype: Any) -> Any:
    """Returns a pytree with its floats in a dtype."""
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, tree)


def widest(leaves: list[Tensor]) -> Any:
    """Returns the largest of the dtypes."""
    dtypes = (leaf.dtype for leaf in leaves)
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=jnp.dtype(jnp.float32))


def _by_shape(param: list[Tensor]) -> list[list[int]]:
    """Returns the numbers of the tensors that are not empty, grouped by shape and dtype."""
    groups: dict[Any, list[int]] = {}
    for i, p in enumerate(param):
        if p.size:
            groups.setdefault((p.shape, p.dtype), []).append(i)
    return list(groups.values())
