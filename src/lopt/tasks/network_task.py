"""Networks trained on data: one task for any network, any examples and any objective.

A network is written with Equinox, as a pair of functions (Flax, Haiku, plain JAX), or, if it
carries something besides its parameters, as an `AbstractNetwork`.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from typing_extensions import override

from lopt.core.checks import check_integer
from lopt.core.task import AbstractTask
from lopt.core.types import Key, Params, Scalar, Split, State, as_pytree
from lopt.tasks.data import Data, Rows

# From a batch of inputs to the outputs of the network.
Predict: TypeAlias = Callable[[PyTree], PyTree]
# From the network and a batch to metrics by name, of which "loss" is trained.
Objective: TypeAlias = Callable[[Predict, Rows], dict[str, Scalar]]
# (key, example) to an example.
Augment: TypeAlias = Callable[[Key, PyTree], PyTree]


class Build(eqx.Module):
    """Builds a network: `function(*args, key=key, **kwargs)`.

    Unlike a closure it equals another one of the same arguments, so that tasks on other data of
    the same shape compile nothing again. Arguments are hashable: tuples, not lists.
    """

    function: Callable[..., Any] = eqx.field(static=True)
    args: tuple[Any, ...] = eqx.field(static=True)
    kwargs: tuple[tuple[str, Any], ...] = eqx.field(static=True)

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.function, self.args = function, args
        self.kwargs = tuple(sorted(kwargs.items()))

    def __call__(self, key: Key) -> Any:
        """Returns a new network."""
        return self.function(*self.args, key=key, **dict(self.kwargs))


class AbstractNetwork(eqx.Module):
    """A network as `NetworkTask` sees it: functions of its parameters and state."""

    @abc.abstractmethod
    def init(self, key: Key) -> Params:
        """Returns initial parameters."""

    def prepare(self, params: Params) -> State:
        """Returns the state before the first step, such as running statistics."""
        return ()

    @abc.abstractmethod
    def apply(
        self, params: Params, state: State, inputs: Rows, inference: bool
    ) -> tuple[PyTree, State]:
        """Returns the outputs for a batch of inputs, and the next state."""


class EquinoxNetwork(AbstractNetwork):
    """A module of Equinox that maps one example; its parameters are its floating-point arrays.

    Attributes:
        build: from a key to the module, such as `Build(eqx.nn.MLP, 4, 2, 8, 1)`.
        dropout: whether training calls `module(example, key=key)`; the task is `stochastic` then.
        structure: what the module has besides arrays, as leaves and tree definition.
    """

    build: Callable[[Key], Any] = eqx.field(static=True)
    dropout: bool = eqx.field(static=True)
    structure: tuple[tuple[Any, ...], Any] = eqx.field(static=True)

    def __init__(self, build: Callable[[Key], Any], dropout: bool = False) -> None:
        shapes, rest = eqx.partition(eqx.filter_eval_shape(build, jax.random.key(0)), _is_shape)
        for leaf in jax.tree.leaves(shapes):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(
                    f"EquinoxNetwork(build={build}) has an array of dtype {leaf.dtype}; all must "
                    "be floating-point, try keeping others in static fields."
                )
        # Flattened, because a network that holds a list or a dict cannot be hashed as it is.
        leaves, treedef = jax.tree.flatten(rest)
        self.build, self.dropout, self.structure = build, dropout, (tuple(leaves), treedef)

    @override
    def init(self, key: Key) -> Params:
        return eqx.filter(self.build(key), eqx.is_inexact_array)

    @override
    def apply(
        self, params: Params, state: State, inputs: Rows, inference: bool
    ) -> tuple[PyTree, State]:
        leaves, treedef = self.structure
        network = eqx.combine(params, treedef.unflatten(leaves))
        if inference or not self.dropout or inputs.key is None:
            return jax.vmap(network)(inputs.arrays), state
        keys = jax.random.split(inputs.key, len(jax.tree.leaves(inputs.arrays)[0]))
        return jax.vmap(lambda example, key: network(example, key=key))(inputs.arrays, keys), state


class InitApply(AbstractNetwork):
    """A network as a pair of functions, as in Flax or Haiku.

    Attributes:
        initialise: from a key to parameters.
        predict: from parameters and a batch of inputs to outputs.
    """

    initialise: Callable[[Key], Params] = eqx.field(static=True)
    predict: Callable[[Params, PyTree], PyTree] = eqx.field(static=True)

    @override
    def init(self, key: Key) -> Params:
        return self.initialise(key)

    @override
    def apply(
        self, params: Params, state: State, inputs: Rows, inference: bool
    ) -> tuple[PyTree, State]:
        return self.predict(params, inputs.arrays), state


AnyNetwork: TypeAlias = AbstractNetwork | Callable[[Key], Any]


def as_network(network: AnyNetwork) -> AbstractNetwork:
    """Returns a network, of a function that builds a module of Equinox too."""
    return network if isinstance(network, AbstractNetwork) else EquinoxNetwork(network)


class NetworkTask(AbstractTask):
    """Trains a network on batches of examples, drawn with replacement.

    Attributes:
        data: the examples, in four splits.
        network: a function from a key to a module of Equinox that maps one example, an
            `InitApply`, or any other `AbstractNetwork`.
        objective: (predict, rows) to metrics by name, of which "loss" is trained: `predict` is the
            network on a batch of inputs, whose floating-point arrays it takes in the dtype of the
            parameters; `rows` is the batch.
        batch_size: examples per step.
        augment: (key, example) to an example; applied to training batches, one example at a time.
        stochastic: whether batches carry a key, for networks or objectives that draw from it.

    Example:
        >>> import equinox as eqx, jax, jax.numpy as jnp, numpy as np, optax, lopt
        >>> x = np.linspace(-1, 1, 200, dtype=np.float32)[:, None]
        >>> def squared_error(predict, rows):
        ...     x, y = rows.arrays
        ...     return {"loss": rows.mean(jnp.sum((predict(x) - y) ** 2, axis=1))}
        >>> task = lopt.tasks.NetworkTask(
        ...     lopt.tasks.array_data((x, np.sin(3 * x))),
        ...     lopt.tasks.Build(eqx.nn.MLP, 1, 1, 16, 1),
        ...     squared_error,
        ...     batch_size=32,
        ... )
        >>> key, optimizer = jax.random.key(0), optax.sgd(0.1)
        >>> state = lopt.start(task, optimizer, task.init(key), key)
        >>> state, losses = lopt.unroll(task, optimizer, state, 300)
        >>> bool(losses[-1] < 0.2 * losses[0])
        True
    """

    data: Data
    network: AbstractNetwork = eqx.field(converter=as_network)
    objective: Objective = eqx.field(converter=as_pytree)
    batch_size: int = eqx.field(static=True, default=128)
    augment: Augment | None = eqx.field(static=True, default=None)
    stochastic: bool = eqx.field(static=True, default=False)

    def __check_init__(self) -> None:
        check_integer("NetworkTask", "batch_size", self.batch_size, hint="batch_size=128")

        def measured(key: Key) -> Any:
            params = self.init(key)
            return self._measure(params, self.prepare(params, key), self.batch(key), True)[0]

        found = eqx.filter_eval_shape(measured, jax.random.key(0))
        loss: Any = found.get("loss") if isinstance(found, dict) else None
        if not (_is_shape(loss) and not loss.shape and jnp.issubdtype(loss.dtype, jnp.floating)):
            raise ValueError(
                f"NetworkTask(objective={self.objective}) returns {found}; must be a dict with a "
                'floating-point scalar "loss", try {"loss": rows.mean(losses)}.'
            )

    @override
    def init(self, key: Key) -> Params:
        return self.network.init(key)

    @override
    def batch(self, key: Key, split: Split = "train") -> Rows:
        draw_key, augment_key = (key, key) if self.augment is None else jax.random.split(key)
        rows = self.data.split(split).draw(draw_key, self.batch_size)
        if self.augment is not None and split == "train":
            keys = jax.random.split(augment_key, self.batch_size)
            rows = dataclasses.replace(rows, arrays=jax.vmap(self.augment)(keys, rows.arrays))
        return self._with_key(rows, key)

    @override
    def everything(self, split: Split = "train") -> Rows | None:
        whole = self.data.split(split).everything()
        return None if whole is None else self._with_key(whole, jax.random.key(0))

    def _with_key(self, rows: Rows, key: Key) -> Rows:
        own = jax.random.fold_in(key, 2) if self.stochastic else rows.key
        return dataclasses.replace(rows, key=own)

    @override
    def prepare(self, params: Params, key: Key) -> State:
        return self.network.prepare(params)

    @override
    def loss(self, params: Params, batch: Rows) -> Scalar:
        return self.loss_and_state(params, self.network.prepare(params), batch)[0]

    @override
    def loss_and_state(self, params: Params, state: State, batch: Rows) -> tuple[Scalar, State]:
        metrics, state = self._measure(params, state, batch, inference=False)
        return metrics["loss"], state

    @override
    def metrics(self, params: Params, state: State, batch: Rows) -> dict[str, Scalar]:
        return self._measure(params, state, batch, inference=True)[0]

    def outputs(self, params: Params, state: State, inputs: PyTree) -> PyTree:
        """Returns the outputs of the network for a batch of inputs, in inference mode."""
        return self.network.apply(params, state, Rows(_like(params, inputs)), True)[0]

    def _measure(
        self, params: Params, state: State, batch: Rows, inference: bool
    ) -> tuple[Any, State]:
        """Returns the objective on a batch, and the state that the network leaves."""
        states = [state]

        def predict(inputs: PyTree) -> PyTree:
            rows = dataclasses.replace(batch, arrays=_like(params, inputs))
            outputs, states[0] = self.network.apply(params, states[0], rows, inference)
            return outputs

        return self.objective(predict, batch), states[0]


def _like(params: Params, inputs: PyTree) -> PyTree:
    """Returns inputs, those that are floating-point in the dtype of the parameters."""
    floating, others = eqx.partition(inputs, eqx.is_inexact_array)
    return eqx.combine(optax.tree.cast(floating, jax.tree.leaves(params)[0].dtype), others)


def _is_shape(leaf: object) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)
