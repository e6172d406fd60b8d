"""Recording: what an optimizer saw and did at a few coordinates of each tensor, as a `record`.

Zheng et al. 2022 (arXiv:2203.06578) record ten coordinates of each tensor while a learned optimizer
trains a network. Here `Coordinatewise.inputs` says what its rule was given at each `Step`.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lopt.core.coordinatewise import Coordinatewise, CoordinatewiseState
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.task import AbstractTaskFamily
from lopt.core.types import Key, Params, Theta
from lopt.core.unroll import Step, start, unroll

RAW_GRADIENT, RAW_PARAMETER, UPDATE = "raw_gradient", "raw_parameter", "update"

Places = tuple[Int[Array, "_place"], ...]
Values = Float[Array, " coordinate"]


class Seen(eqx.Module):
    """What was seen and done at the recorded coordinates, those of all tensors end to end.

    Attributes:
        features: by name, as the rule got them; and "raw_gradient" and "raw_parameter".
        outputs: "output", or "output_0" and so on where a rule has several, before their scale;
            and "update", which was added to the parameter.
    """

    # Unlike a plain dict these keep their order on their way through JAX.
    features: OrderedDict[str, Values]
    outputs: OrderedDict[str, Values]


class Recorder(eqx.Module):
    """A `record` for `lopt.unroll`: features, gradient, parameter, outputs and update.

    For a `Coordinatewise` optimizer the features are those that its rule got: normalised, and the
    shared ones such as time. For any other they are "gradient" and "parameter". While a step is
    recorded, the features of all coordinates exist at once: of a million weights and 40 features,
    160 MB.

    Attributes:
        places: for each tensor of the parameters, flat indices of coordinates, see `draw_places`.
        learned: the optimizer of the run, if it is a learned one.
        theta: its weights.

    Example:
        >>> import jax, jax.numpy as jnp, lopt
        >>> task = lopt.tasks.Quadratic(jnp.ones(3), jnp.zeros(3))
        >>> learned, key = lopt.small_mlp(), jax.random.key(0)
        >>> theta, params = learned.init(key), task.init(key)
        >>> optimizer = learned.optimizer(theta)
        >>> record = Recorder(draw_places(params, 2, key), learned, theta)
        >>> state = lopt.start(task, optimizer, params, key)
        >>> _, seen = lopt.unroll(task, optimizer, state, 5, record=record)
        >>> seen.features["momentum_0.9"].shape, sorted(seen.outputs)
        ((5, 2), ['output_0', 'output_1', 'update'])
    """

    places: Places
    learned: AbstractLearnedOptimizer | None = None
    theta: Theta = None

    def __call__(self, step: Step) -> Seen:
        """Returns what is recorded of a step.

        Raises:
            ValueError: if the step is not of such an optimizer, or of other parameters.
        """
        leaves = jax.tree.leaves(step.params)
        if len(leaves) != len(self.places):
            raise ValueError(
                f"Recorder(places) is for {len(self.places)} tensors, but the run trains "
                f"{len(leaves)}; try draw_places(params, 10, key) with its params."
            )
        gradient = self._pick(step.grads)
        parameter, update = self._pick(step.params), self._pick(step.updates)
        features = OrderedDict(gradient=gradient, parameter=parameter)
        outputs: OrderedDict[str, Values] = OrderedDict()
        if isinstance(self.learned, Coordinatewise):
            features, outputs = self._features_and_outputs(self.learned, step)
        raw = OrderedDict({RAW_GRADIENT: gradient, RAW_PARAMETER: parameter})
        return Seen(features | raw, outputs | OrderedDict({UPDATE: update}))

    def _pick(self, tree: Params) -> Values:
        parts = [
            jnp.ravel(leaf)[places]
            for leaf, places in zip(jax.tree.leaves(tree), self.places, strict=True)
        ]
        dtype = _widest(parts)
        return jnp.concatenate([part.astype(dtype) for part in parts])

    def _features_and_outputs(
        self, learned: Coordinatewise, step: Step
    ) -> tuple[OrderedDict[str, Values], OrderedDict[str, Values]]:
        if not isinstance(step.opt_state, CoordinatewiseState):
            raise ValueError(
                "Recorder(learned=Coordinatewise(...)) was given the step of another optimizer, "
                f"with the state {jax.tree.structure(step.opt_state)}; record a run of "
                "learned.optimizer(theta) itself, or leave out learned."
            )
        leaves = jax.tree.leaves(step.params)
        firsts = [sum(leaf.size for leaf in leaves[:i]) for i in range(len(leaves))]
        places = [first + own for first, own in zip(firsts, self.places, strict=True)]
        inputs = learned.inputs(self.theta, step.grads, step.opt_state, step.params)
        seen = inputs.at(jnp.concatenate(places))
        weights = jax.tree.map(lambda w: w.astype(seen.columns.dtype), self.theta["rule"])
        outputs, _ = learned.rule.apply(weights, seen.columns, seen.shared, seen.memory)
        common = jnp.broadcast_to(seen.shared[:, None], (len(seen.shared), outputs.shape[1]))
        values = jnp.concatenate([seen.columns, common])
        single = len(outputs) == 1
        said = ["output"] if single else [f"output_{i}" for i in range(len(outputs))]
        named = OrderedDict(zip(learned.features.names(), values, strict=True))
        return named, OrderedDict(zip(said, outputs, strict=True))


def draw_places(params: Params, count: int, key: Key) -> Places:
    """Draws different coordinates of each tensor.

    Each of `count` equal parts of a tensor gives one of its coordinates, any with the same chance.

    Args:
        params: a pytree of arrays.
        count: coordinates per tensor; one with fewer gives all of its own.
        key: of the draw.

    Returns:
        Flat indices for each tensor, increasing.

    Raises:
        ValueError: if `count` is not positive.

    Example:
        >>> params = {"bias": jnp.zeros(2), "weight": jnp.zeros((9, 9))}
        >>> bias, weight = draw_places(params, 3, jax.random.key(0))
        >>> bias.tolist(), len(weight)
        ([0, 1], 3)
    """
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"draw_places(count={count!r}) must be a positive integer; try 10.")

    def draw(size: int, key: Key) -> Int[Array, " place"]:
        parts = min(count, size)
        if not parts:
            return jnp.zeros(0, jnp.int32)
        edges = jnp.asarray([part * size // parts for part in range(parts + 1)], jnp.int32)
        return jax.random.randint(key, (parts,), edges[:-1], edges[1:], jnp.int32)

    leaves = jax.tree.leaves(params)
    return tuple(draw(leaf.size, jax.random.fold_in(key, i)) for i, leaf in enumerate(leaves))


class Recorded(eqx.Module):
    """One recorded run.

    Attributes:
        seen: with a leading axis of steps.
        task: numbers that tell tasks apart: equal for two runs that drew the same.
        tensor, coordinate: which tensor each recorded coordinate is of, in tree order, and its
            number among all coordinates of the network.
    """

    seen: Seen
    task: Float[Array, " number"]
    tensor: Int[Array, " coordinate"]
    coordinate: Int[Array, " coordinate"]


def record_episode(
    tasks: AbstractTaskFamily,
    learned: AbstractLearnedOptimizer | optax.GradientTransformation,
    theta: Theta,
    key: Key,
    steps: int,
    per_tensor: int = 10,
) -> Recorded:
    """Trains one task from a family and records it. Map it over keys for more runs.

    Args:
        tasks: what is trained.
        learned: the optimizer: a learned one, or any of Optax.
        theta: the weights of a learned one; not used for one of Optax.
        key: of task, initial parameters, batches and coordinates.
        steps: how many are taken, and recorded.
        per_tensor: coordinates recorded of each tensor.

    Raises:
        ValueError: if `steps` or `per_tensor` is not positive.
    """
    task_key, init_key, run_key, place_key = jax.random.split(key, 4)
    task = tasks.draw(task_key)
    params = task.init(init_key)
    places = draw_places(params, per_tensor, place_key)
    if isinstance(learned, AbstractLearnedOptimizer):
        optimizer = learned.optimizer(theta, steps)
        record = Recorder(places, learned, theta)
    else:
        optimizer, record = learned, Recorder(places)
    _, seen = unroll(task, optimizer, start(task, optimizer, params, run_key), steps, record=record)
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    return Recorded(
        seen,
        jnp.stack(list(_sums(task))),
        jnp.concatenate([jnp.full(len(p), i, jnp.int32) for i, p in enumerate(places)]),
        jnp.concatenate([first + p for first, p in zip(firsts, places, strict=True)]),
    )


def _sums(task: Any) -> Iterator[Float[Array, ""]]:
    """Yields sums and sums of squares of the arrays that a task holds."""
    yield jnp.zeros((), jnp.float32)
    for leaf in jax.tree.leaves(eqx.filter(task, eqx.is_array)):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        numbers = (jax.random.key_data(leaf) if key else leaf).astype(jnp.float32)
        yield jnp.sum(numbers)
        yield jnp.sum(numbers * numbers)


def _widest(arrays: list[Array]) -> Any:
    """Returns the widest dtype among arrays, and float32 at least."""
    return max([jnp.dtype(jnp.float32), *(a.dtype for a in arrays)], key=lambda d: d.itemsize)
