"""Synthetic problems of TaskSet, after Wichrowska et al. 2017 (arXiv:1703.04813).

There are eleven problems. Three wrappers make the other three kinds of problems from them.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal, cast

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree
from typing_extensions import override

from lopt.core.task import AbstractTask
from lopt.core.types import Batch, Key, Params, Scalar, Split
from lopt.tasks.augment import rescaled
from lopt.tasks.data import Examples
from lopt.tasks.landscapes import (
    Ackley,
    Beale,
    Branin,
    LogSumExp,
    Matyas,
    Michalewicz,
    Rosenbrock,
    StyblinskiTang,
)
from lopt.tasks.taskset.config import Config, Draw, Load, family
from lopt.tasks.taskset.pieces import ACTIVATIONS, draw_activation
from lopt.tasks.wrapped import LogLoss, PerturbedTask

# From parameters, arrays that stay and rows of the batch to the loss.
Function = Callable[[Params, PyTree, Any], Scalar]


class Problem(AbstractTask):
    """A function of parameters.

    Parameters start normal, or uniform in a box.

    Attributes:
        function: (params, arrays, rows) to the loss.
        shapes: of the parameters; a single one gives an array, several a tuple of them.
        deviations: of each of them at the start.
        arrays: what the function is made with.
        box: ends of the intervals that parameters start in.
        examples: what batches are drawn from, `batch_size` rows at a time.
    """

    function: Function = eqx.field(static=True)
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


def _classifier(function: Function, shapes: Any, rows: Any, batch: int) -> Problem:
    deviations = tuple(1.2 / math.sqrt(shape[0]) for shape in shapes)
    return Problem(function, shapes, (), Examples(rows), batch, deviations)


# Each with the box that it starts in, None for a standard normal, and what is added to the loss.
LANDSCAPES: dict[str, tuple[Callable[[], Any], Any, float]] = {
    "ackley": (Ackley, (-32.768, 32.768), 0.0),
    "beale": (Beale, (-4.5, 4.5), 0.0),
    "branin": (Branin, ((-5.0, 0.0), (10.0, 15.0)), 0.0),
    "logsumexp": (LogSumExp, None, 0.0),
    "matyas": (Matyas, (-10.0, 10.0), 0.0),
    "michalewicz": (Michalewicz, (0.0, math.pi), 2.0),
    "rosenbrock": (Rosenbrock, (-5.0, 10.0), 0.0),
    "styblinski_tang": (StyblinskiTang, (-5.0, 5.0), 80.0),
}
_MANY = {"dim": (3, 100), "batch": (1, 200), "samples": (100, 20_000)}
# The fields of each problem that are log-uniform integers.
PROBLEMS: dict[str, dict[str, tuple[int, int]]] = {
    "quadratic": {"dim": (10, 1000)},
    "bowl": {},
    "optimization_test_problems": {},
    "fully_connected": {"dim": (1, 16), "batch": (1, 200), "samples": (1, 30)},
    "norm": {"dim": (3, 1000)},
    "dependency_chain": {"dim": (3, 100)},
    "outward_snake": _MANY,
    "min_max_well": {"dim": (10, 1000)},
    "sum_of_quadratics": _MANY,
    "projection_quadratic": _MANY,
    "sparse_softmax_regression": {"dim": (2, 100), "batch": (1, 50), "samples": (1, 30)},
}
_NOISY = ("quadratic", "bowl", "optimization_test_problems", "min_max_well")
WRAPPERS = ("sparse_problems", "rescale_problems", "log_objective")


@family("losg_tasks_family")
@dataclasses.dataclass(frozen=True)
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
        clipped: whether negative losses count as zero before their logarithm is taken.
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
        names: dict[str, Any] = {
            "problem": PROBLEMS,
            "landscape": LANDSCAPES,
            "activation": ACTIVATIONS,
        }
        for field, known in names.items():
            value = getattr(self, field)
            if value not in known and (value is not None or field == "problem"):
                raise ValueError(
                    f"SyntheticConfig({field}={value!r}) must be one of {', '.join(known)}."
                )
        for field in (*PROBLEMS[self.problem], *_OTHERS.get(self.problem, ())):
            if getattr(self, field) is None:
                raise ValueError(f"SyntheticConfig(problem={self.problem!r}) needs {field}.")

    @classmethod
    @override
    def draw(cls, draw: Draw) -> "SyntheticConfig":
        name, wrapper = draw.choice((*PROBLEMS, *WRAPPERS)), cast(Any, None)
        if name in WRAPPERS:
            # All but the regression, which was last.
            name, wrapper = draw.choice(tuple(PROBLEMS)[:-1]), name
        found: dict[str, Any] = {
            field: draw.log_integer(*ends) for field, ends in PROBLEMS[name].items()
        }
        if name in _NOISY or name == "sparse_softmax_regression":
            found["noise"] = _draw_noise(draw)
            if wrapper and draw.compat == "taskset":
                found["noise"] = 0.0  # as published, the noise of a wrapped problem is lost
        if name == "bowl":
            found["condition"] = draw.log_uniform(0.01, 100.0)
            found["angle"] = draw.choice((0.0, 0.0, math.pi / 4, math.pi / 3))
        elif name == "optimization_test_problems":
            found["landscape"] = draw.choice(tuple(LANDSCAPES))
        elif name == "norm":
            found["power"] = draw.uniform(0.1, 5.0)
        elif name == "fully_connected":
            found["activation"], depth = draw_activation(draw), draw.choice((2, 3, 4, 5))
            equal = draw.flag(0.5)
            widths = tuple(draw.log_integer(4, 32) for _ in range(1 if equal else depth))
            found["widths"] = widths * depth if equal else widths
        if wrapper == "sparse_problems":
            found["zeros"], found["sparse_noise"] = draw.uniform(0.9, 0.99), _draw_noise(draw)
        elif wrapper == "rescale_problems":
            found["scale"] = draw.log_uniform(0.001, 1000.0)
        clipped = draw.compat == "clean"
        return cls(name, wrapper, draw.integer(100_000), clipped=clipped, **found)

    @override
    def build(self, load: Load) -> AbstractTask:
        task: AbstractTask = self._problem()
        if self.noise > 0:
            task = PerturbedTask(task, _array(self.noise), _array(0.0))
        if self.wrapper == "sparse_problems":
            task = PerturbedTask(task, _array(self.sparse_noise), _array(self.zeros))
        elif self.wrapper == "rescale_problems":
            task = rescaled(task, _array(self.scale))
        elif self.wrapper == "log_objective":
            task = LogLoss(task, self.clipped)
        return task

    def _problem(self) -> Problem:
        normal = np.random.default_rng(self.seed).normal
        dim: Any = self.dim
        match self.problem:
            case "quadratic" | "norm":
                arrays = _array(normal(size=(dim, dim))), _array(normal(size=dim))
                if self.problem == "quadratic":
                    return Problem(_quadratic, ((dim,),), arrays)
                return Problem(_norm, ((dim,),), (*arrays, _array(self.power)))
            case "bowl":
                cos, sin = math.cos(self.angle or 0), math.sin(self.angle or 0)
                rotation = np.array([[cos, -sin], [sin, cos]])
                matrix = np.sqrt(np.diag([self.condition, 1.0])) @ rotation
                return Problem(_quadratic, ((2,),), (_array(matrix), jnp.zeros(2)))
            case "optimization_test_problems":
                landscape, ends, offset = LANDSCAPES[self.landscape or ""]
                box = None if ends is None else tuple(map(_array, ends))
                return Problem(_landscape, ((2,),), (landscape(), _array(offset)), box=box)
            case "dependency_chain":
                return Problem(_dependency_chain, ((dim + 1,),))
            case "min_max_well":
                return Problem(_min_max_well, ((dim,),))
        count, batch = self.samples or 1, self.batch or 1
        if self.problem == "sparse_softmax_regression":
            generator = np.random.default_rng(self.seed)
            ids = generator.integers(0, 2, (count, 5))
            labels = (ids.sum(axis=1) + (generator.uniform(size=count) < 0.25)) % 2
            rows = _array(ids, jnp.int32), _array(labels, jnp.int32)
            return _classifier(_parity, ((2, dim), (dim, 2), (2,)), rows, batch)
        if self.problem in ("sum_of_quadratics", "projection_quadratic"):
            half = normal(size=(count // 2, dim))
            quadratics = (_sum_of_quadratics, _projection_quadratic)
            function = quadratics[self.problem == "projection_quadratic"]
            examples = Examples(_array(np.concatenate([half, -half])))
            return Problem(function, ((dim,),), (), examples, batch)
        hidden = inputs = normal(size=(count, dim))
        # The labels are whether a unit of a random network is active.
        for _ in range(6):
            weights = normal(size=(hidden.shape[1], 20)) * math.sqrt(2 / dim)
            hidden = np.maximum(hidden @ weights, 0)
        rows = _array(inputs), _array(hidden[:, 0] > 0, jnp.int32)
        if self.problem == "outward_snake":
            return Problem(_outward_snake, ((dim,),), (), Examples(rows), batch)
        sizes = (dim, *(self.widths or ()), 2)
        shapes = tuple(
            shape
            for before, after in itertools.pairwise(sizes)
            for shape in ((before, after), (after,))
        )
        return _classifier(Network(self.activation or ""), shapes, rows, batch)


_NAMES: dict[str, dict[str, Any]] = {
    "problem": PROBLEMS,
    "landscape": LANDSCAPES,
    "activation": ACTIVATIONS,
}
_OTHERS = {
    "bowl": ("condition", "angle"),
    "optimization_test_problems": ("landscape",),
    "fully_connected": ("activation", "widths"),
    "norm": ("power",),
}


def _array(values: Any, dtype: Any = float) -> jax.Array:
    return jnp.asarray(values, dtype)


def _draw_noise(draw: Draw) -> float:
    """Samples the standard deviation of a gradient's noise: none, half of the time."""
    return draw.log_uniform(0.01, 10.0) if draw.flag(0.5) else 0.0
