"""Synthetic problems of TaskSet, after Wichrowska et al. 2017 (arXiv:1703.04813).

There are eleven problems. Three wrappers make the other three kinds of problems from them.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree
from typing_extensions import override

from lopt.core.task import AbstractTask, TransformedTask
from lopt.core.types import Batch, Key, Params, Scalar, Split
from lopt.tasks import landscapes
from lopt.tasks.augment import in_units
from lopt.tasks.data import Examples
from lopt.tasks.taskset.config import Config, Draw, Load, family, known
from lopt.tasks.taskset.pieces import ACTIVATIONS, draw_activation
from lopt.tasks.wrapped import PerturbedTask


class Problem(AbstractTask):
    """A function of parameters, which start normal, or uniform in a box.

    Attributes:
        function: (params, arrays, rows) to the loss.
        shapes: of the parameters; a single one gives an array, several a tuple of them.
        arrays: what the function is made with.
        examples: what batches are drawn from, `batch_size` rows at a time.
        deviations: of each of the parameters at the start.
        box: ends of the intervals that parameters start in.
    """

    function: Callable[[Params, PyTree, Any], Scalar] = eqx.field(static=True)
    shapes: tuple[tuple[int, ...], ...] = eqx.field(static=True)
    arrays: PyTree = ()
    examples: Examples | None = None
    batch_size: int = eqx.field(static=True, default=1)
    deviations: tuple[float, ...] = eqx.field(static=True, default=(1.0,))
    box: PyTree = None

    @override
    def init(self, key: Key) -> Params:
        if self.box is not None:
            low, high = self.box
            return low + (high - low) * jax.random.uniform(key, self.shapes[0])
        keys = jax.random.split(key, len(self.shapes))
        parts = zip(self.deviations, keys, self.shapes, strict=True)
        params = tuple(deviation * jax.random.normal(key, shape) for deviation, key, shape in parts)
        return params if params[1:] else params[0]

    @override
    def batch(self, key: Key, split: Split = "train") -> Batch:
        return () if self.examples is None else self.examples.draw(key, self.batch_size).arrays

    @override
    def loss(self, params: Params, batch: Batch) -> Scalar:
        dtype = jax.tree.leaves(params)[0].dtype
        numbers, others = eqx.partition((self.arrays, batch), eqx.is_inexact_array)
        return self.function(params, *eqx.combine(optax.tree.cast(numbers, dtype), others))


def _quadratic(x: Any, arrays: Any, rows: Any) -> Scalar:
    weights, target = arrays
    return 0.5 * jnp.sum((weights @ x - target) ** 2)


def _norm(x: Any, arrays: Any, rows: Any) -> Scalar:
    weights, target, power = arrays
    return jnp.sum((jnp.abs(weights @ x - target) + 1e-6) ** power) ** (1 / power)


def _dependency_chain(x: Any, arrays: Any, rows: Any) -> Scalar:
    return x[0] ** 2 + jnp.sum(x[1:] ** 2 / (x[:-1] ** 2 + 1e-6))


def _outward_snake(x: Any, arrays: Any, rows: Any) -> Scalar:
    inputs, _ = rows
    outward = jnp.sum(inputs[:, 0]) / (jnp.sqrt(jnp.sum(x**2)) + 1e-6)
    return outward + jnp.sum(((x[1:] - math.pi * jnp.cos(x[:-1]))[None] * inputs[:, 1:]) ** 2)


def _min_max_well(x: Any, arrays: Any, rows: Any) -> Scalar:
    return jnp.max(x**2) + 1 / jnp.min(x**2) - 2


def _sum_of_quadratics(x: Any, arrays: Any, rows: Any) -> Scalar:
    return jnp.sum((x[None] - rows) ** 2) - jnp.sum(rows**2)


def _projection_quadratic(x: Any, arrays: Any, rows: Any) -> Scalar:
    return jnp.sum((x[None] * rows) ** 2)


def _landscape(x: Any, arrays: Any, rows: Any) -> Scalar:
    landscape, offset = arrays
    return landscape.loss(x, ()) + offset


def _parity(params: Any, arrays: Any, rows: Any) -> Scalar:
    embeddings, weights, bias = params
    ids, labels = rows
    hidden = jnp.sum(jax.nn.one_hot(ids, 2, dtype=weights.dtype) @ embeddings, axis=1)
    return _cross_entropy(hidden @ weights + bias[None], labels, params)


class Network(eqx.Module):
    """The loss of a multilayer perceptron whose parameters are weights and biases in turn."""

    activation: str

    def __call__(self, params: Any, arrays: Any, rows: Any) -> Scalar:
        """Returns the loss on rows of inputs and labels."""
        hidden, labels = rows
        for i in range(0, len(params), 2):
            hidden = ACTIVATIONS[self.activation](hidden) if i else hidden
            hidden = hidden @ params[i] + params[i + 1][None]
        return _cross_entropy(hidden, labels, params)


def _cross_entropy(logits: Any, labels: Any, params: Any) -> Scalar:
    # The logit of the first class is that of a binary label; the second one is not trained.
    losses = optax.sigmoid_binary_cross_entropy(logits[:, 0], labels.astype(logits.dtype))
    squares = jnp.stack([jnp.sum(leaf**2) for leaf in params])
    return jnp.mean(losses) + 1e-3 * jnp.mean(squares)


# Each with the box that it starts in, None for a standard normal, and what is added to the loss.
LANDSCAPES: dict[str, tuple[Callable[[], Any], Any, float]] = {
    "ackley": (landscapes.Ackley, (-32.768, 32.768), 0.0),
    "beale": (landscapes.Beale, (-4.5, 4.5), 0.0),
    "branin": (landscapes.Branin, ((-5.0, 0.0), (10.0, 15.0)), 0.0),
    "logsumexp": (landscapes.LogSumExp, None, 0.0),
    "matyas": (landscapes.Matyas, (-10.0, 10.0), 0.0),
    "michalewicz": (landscapes.Michalewicz, (0.0, math.pi), 2.0),
    "rosenbrock": (landscapes.Rosenbrock, (-5.0, 10.0), 0.0),
    "styblinski_tang": (landscapes.StyblinskiTang, (-5.0, 5.0), 80.0),
}


def _array(values: Any, dtype: Any = float) -> jax.Array:
    return jnp.asarray(values, dtype)


def _make_square(config: Any, normal: Any) -> Problem:
    dim = config.dim
    arrays = _array(normal(size=(dim, dim))), _array(normal(size=dim))
    if config.power is None:
        return Problem(_quadratic, ((dim,),), arrays)
    return Problem(_norm, ((dim,),), (*arrays, _array(config.power)))


def _make_bowl(config: Any, normal: Any) -> Problem:
    cos, sin = math.cos(config.angle), math.sin(config.angle)
    matrix = np.sqrt(np.diag([config.condition, 1.0])) @ np.array([[cos, -sin], [sin, cos]])
    return Problem(_quadratic, ((2,),), (_array(matrix), jnp.zeros(2)))


def _make_landscape(config: Any, normal: Any) -> Problem:
    landscape, ends, offset = LANDSCAPES[config.landscape]
    box = None if ends is None else tuple(map(_array, ends))
    return Problem(_landscape, ((2,),), (landscape(), _array(offset)), box=box)


def _make_chain(config: Any, normal: Any) -> Problem:
    return Problem(_dependency_chain, ((config.dim + 1,),))


def _make_well(config: Any, normal: Any) -> Problem:
    return Problem(_min_max_well, ((config.dim,),))


def _make_symmetric(function: Any) -> Callable[[Any, Any], Problem]:
    """Examples are pairs of opposites."""

    def make(config: Any, normal: Any) -> Problem:
        half = normal(size=(config.samples // 2, config.dim))
        examples = Examples(_array(np.concatenate([half, -half])))
        return Problem(function, ((config.dim,),), (), examples, config.batch)

    return make


def _labelled(config: Any, normal: Any) -> Examples:
    """Returns normal inputs, and whether a unit of a random network is active."""
    hidden = inputs = normal(size=(config.samples, config.dim))
    for _ in range(6):
        weights = normal(size=(hidden.shape[1], 20)) * math.sqrt(2 / config.dim)
        hidden = np.maximum(hidden @ weights, 0)
    return Examples((_array(inputs), _array(hidden[:, 0] > 0, jnp.int32)))


def _make_snake(config: Any, normal: Any) -> Problem:
    return Problem(_outward_snake, ((config.dim,),), (), _labelled(config, normal), config.batch)


def _make_network(config: Any, normal: Any) -> Problem:
    sizes = itertools.pairwise((config.dim, *config.widths, 2))
    shapes = tuple(shape for before, after in sizes for shape in ((before, after), (after,)))
    return _classifier(Network(config.activation), shapes, _labelled(config, normal), config.batch)


def _make_parity(config: Any, normal: Any) -> Problem:
    generator = np.random.default_rng(config.seed)
    ids = generator.integers(0, 2, (config.samples, 5))
    labels = (ids.sum(axis=1) + (generator.uniform(size=len(ids)) < 0.25)) % 2
    rows = Examples((_array(ids, jnp.int32), _array(labels, jnp.int32)))
    return _classifier(_parity, ((2, config.dim), (config.dim, 2), (2,)), rows, config.batch)


def _classifier(function: Any, shapes: Any, examples: Examples, batch: int) -> Problem:
    deviations = tuple(1.2 / math.sqrt(shape[0]) for shape in shapes)
    return Problem(function, shapes, (), examples, batch, deviations)


def _draw_noise(draw: Draw) -> float:
    """Samples the standard deviation of a gradient's noise: none, half of the time."""
    return draw.log_uniform(0.01, 10.0) if draw.flag(0.5) else 0.0


def _draw_widths(draw: Draw) -> tuple[int, ...]:
    depth, equal = draw.choice((2, 3, 4, 5)), draw.flag(0.5)
    widths = tuple(draw.log_integer(4, 32) for _ in range(1 if equal else depth))
    return widths * depth if equal else widths


FIELDS: dict[str, Callable[[Draw], Any]] = {
    "noise": _draw_noise,
    "condition": lambda draw: draw.log_uniform(0.01, 100.0),
    "angle": lambda draw: draw.choice((0.0, 0.0, math.pi / 4, math.pi / 3)),
    "landscape": lambda draw: draw.choice(tuple(LANDSCAPES)),
    "activation": draw_activation,
    "widths": _draw_widths,
    "power": lambda draw: draw.uniform(0.1, 5.0),
    "zeros": lambda draw: draw.uniform(0.9, 0.99),
    "sparse_noise": _draw_noise,
    "scale": lambda draw: draw.log_uniform(0.001, 1000.0),
}
WRAPPERS: dict[str, tuple[str, ...]] = {
    "sparse_problems": ("zeros", "sparse_noise"),
    "rescale_problems": ("scale",),
    "log_objective": (),
}


class Kind(NamedTuple):
    """How problems are made from a configuration and normal numbers, and what is drawn for them.

    Attributes:
        integers: fields that are log-uniform integers, and the ends of their ranges.
        fields: others, see `FIELDS`.
    """

    make: Callable[[Any, Any], Problem]
    integers: dict[str, tuple[int, int]]
    fields: tuple[str, ...] = ()


_MANY = {"dim": (3, 100), "batch": (1, 200), "samples": (100, 20_000)}
_FEW = {"dim": (1, 16), "batch": (1, 200), "samples": (1, 30)}
_PARITY = {"dim": (2, 100), "batch": (1, 50), "samples": (1, 30)}
PROBLEMS: dict[str, Kind] = {
    "quadratic": Kind(_make_square, {"dim": (10, 1000)}, ("noise",)),
    "bowl": Kind(_make_bowl, {}, ("noise", "condition", "angle")),
    "optimization_test_problems": Kind(_make_landscape, {}, ("noise", "landscape")),
    "fully_connected": Kind(_make_network, _FEW, ("activation", "widths")),
    "norm": Kind(_make_square, {"dim": (3, 1000)}, ("power",)),
    "dependency_chain": Kind(_make_chain, {"dim": (3, 100)}),
    "outward_snake": Kind(_make_snake, _MANY),
    "min_max_well": Kind(_make_well, {"dim": (10, 1000)}, ("noise",)),
    "sum_of_quadratics": Kind(_make_symmetric(_sum_of_quadratics), _MANY),
    "projection_quadratic": Kind(_make_symmetric(_projection_quadratic), _MANY),
    "sparse_softmax_regression": Kind(_make_parity, _PARITY, ("noise",)),
}


@family("losg_tasks_family")
class SyntheticConfig(Config):
    """A synthetic problem; fields that it has no use for are None.

    Attributes:
        problem: its name.
        wrapper: what is made of it, if anything.
        seed: of its arrays and examples.
        dim: the number of parameters, or of features.
        batch, samples: examples in a step, and in all.
        noise: standard deviation of gradients.
        condition, angle: of a bowl.
        landscape: one of `LANDSCAPES`.
        activation, widths: of a network.
        power: of a norm.
        zeros, sparse_noise: the probability that an entry of a sparse gradient is zero, and the
            noise of the others.
        scale: of rescaled parameters.
        clipped: whether negative losses count as zero before their logarithm is taken; otherwise
            it is NaN.
    """

    problem: str
    wrapper: Literal["sparse_problems", "rescale_problems", "log_objective"] | None
    seed: int
    dim: int | None = None
    batch: int | None = None
    samples: int | None = None
    noise: float = 0.0
    condition: float | None = None
    angle: float | None = None
    landscape: str | None = None
    activation: str | None = None
    widths: tuple[int, ...] | None = None
    power: float | None = None
    zeros: float | None = None
    sparse_noise: float | None = None
    scale: float | None = None
    clipped: bool = True

    def __post_init__(self) -> None:
        kind = PROBLEMS[known("problem", self.problem, PROBLEMS)]
        for field in (*kind.integers, *kind.fields, *WRAPPERS.get(self.wrapper or "", ())):
            if getattr(self, field) is None:
                raise ValueError(f"SyntheticConfig(problem={self.problem!r}) needs {field}.")
        for field, names in (("landscape", LANDSCAPES), ("activation", ACTIVATIONS)):
            if (name := getattr(self, field)) is not None:
                known(field, name, cast(Any, names))

    @classmethod
    @override
    def draw(cls, draw: Draw) -> "SyntheticConfig":
        name, wrapper = draw.choice((*PROBLEMS, *WRAPPERS)), cast(Any, None)
        if name in WRAPPERS:
            # All but the regression, which was last.
            name, wrapper = draw.choice(tuple(PROBLEMS)[:-1]), name
        kind = PROBLEMS[name]
        found: dict[str, Any] = {f: draw.log_integer(*ends) for f, ends in kind.integers.items()}
        found |= {field: FIELDS[field](draw) for field in kind.fields}
        if wrapper and draw.compat == "taskset":
            found["noise"] = 0.0  # as published, the noise of a wrapped problem is lost
        found |= {field: FIELDS[field](draw) for field in WRAPPERS.get(wrapper, ())}
        return cls(name, wrapper, draw.integer(100_000), clipped=draw.compat == "clean", **found)

    @override
    def build(self, load: Load) -> AbstractTask:
        normal = np.random.default_rng(self.seed).normal
        task: AbstractTask = PROBLEMS[self.problem].make(self, normal)
        if self.noise > 0:
            task = PerturbedTask(task, _array(self.noise), _array(0.0))
        if self.wrapper == "sparse_problems":
            return PerturbedTask(task, _array(self.sparse_noise), _array(self.zeros))
        if self.wrapper == "rescale_problems":
            return in_units(task, 1 / _array(self.scale))
        if self.wrapper == "log_objective":
            return TransformedTask(task, map_loss=_log_clipped if self.clipped else _log)
        return task


def _log(loss: Scalar) -> Scalar:
    return jnp.log(loss + 1e-6) - jnp.log(1e-6)


def _log_clipped(loss: Scalar) -> Scalar:
    return _log(jnp.maximum(loss, 0))
