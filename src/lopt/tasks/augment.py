"""Families of tasks made of other families (Metz et al. 2020, arXiv:2009.11243).

Each draws a task of an inner family and changes something about it, by an amount that is an array:
one compiled program trains many different tasks side by side. They nest in any order.
"""

import abc
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int, PyTree
from typing_extensions import override

from lopt.core.checks import check_integer
from lopt.core.task import AbstractTask, AbstractTaskFamily, TransformedTask
from lopt.core.types import SPLITS, Batch, Key, Params, Split
from lopt.tasks.data import Data, Rows
from lopt.tasks.ranges import check_range, log_uniform, random_index
from lopt.tasks.wrapped import AbstractRandomised, AbstractWrapped, DelayedTask, PerturbedTask


class AbstractAugmentation(AbstractTaskFamily):
    """A family that changes something about the tasks of another, `family`."""

    family: AbstractTaskFamily

    @abc.abstractmethod
    def change(self, task: AbstractTask, key: Key) -> AbstractTask:
        """Returns a changed task."""

    @override
    def draw(self, key: Key) -> AbstractTask:
        task_key, change_key = jax.random.split(key)
        return self.change(self.family.draw(task_key), change_key)

    @override
    def architectures(self) -> tuple[AbstractTaskFamily, ...]:
        parts = self.family.architectures()
        return tuple(dataclasses.replace(self, family=part) for part in parts)


class AbstractScaling(AbstractAugmentation):
    """A change by log-uniform factors between `low` and `high`."""

    low: float = eqx.field(static=True)
    high: float = eqx.field(static=True)

    def __check_init__(self) -> None:
        check_range(type(self).__name__, self.low, self.high)


class DataSubset(AbstractAugmentation):
    """Tasks that train on few examples: a window of the training split, at a random place.

    Other splits stay whole. The arrays are not copied.

    Attributes:
        family: any family of tasks on `Data`.
        size: the number of training examples that each task may draw; of a text, tokens.
        smallest: if given, each task has its own number, log-uniform from this to `size`.
    """

    size: int = eqx.field(static=True)
    smallest: int | None = eqx.field(static=True, default=None)

    def __check_init__(self) -> None:
        check_integer("DataSubset", "size", self.size, hint="size=100")
        field = "size" if self.smallest is None else "smallest"
        check_integer("DataSubset", field, least := getattr(self, field), most=self.size)
        leaves = jax.tree.leaves(self.family, is_leaf=lambda leaf: isinstance(leaf, Data))
        found = [leaf for leaf in leaves if isinstance(leaf, Data)]
        if not found:
            kind = type(self.family).__name__
            raise ValueError(f"DataSubset(family={kind}(...)) has no data; try mlp_classification.")
        for data in found:
            if least < (data.train.length or 1):
                raise ValueError(
                    f"DataSubset({field}={least}) is shorter than an example, of "
                    f"{data.train.length} tokens; try {field}={100 * data.train.length}."
                )
            # Inside a compiled function the count may be unknown; `draw` then keeps to it.
            if not isinstance(data.train.count, jax.core.Tracer) and self.size > data.train.count:
                raise ValueError(
                    f"DataSubset(size={self.size}) must not exceed the {data.train.count} examples "
                    f"of the training split; try size={data.train.count}."
                )

    @override
    def change(self, task: AbstractTask, key: Key) -> AbstractTask:
        wanted = jnp.asarray(self.size)
        if self.smallest is not None:
            ends = float(self.smallest), float(self.size)
            wanted = jnp.round(log_uniform(jax.random.fold_in(key, 1), *ends))

        def narrow(data: Data) -> Data:
            size = jnp.minimum(wanted.astype(jnp.int32), data.train.count)
            first = data.train.first + random_index(key, data.train.count - size + 1)
            return eqx.tree_at(lambda d: (d.train.first, d.train.count), data, (first, size))

        return _map_kind(Data, narrow, task)


class InputScale(AbstractScaling):
    """Tasks whose inputs are multiplied by a log-uniform factor between `low` and `high`.

    Inputs are the floating-point arrays of `Rows` in a batch, such as images.
    """

    @override
    def change(self, task: AbstractTask, key: Key) -> TransformedTask:
        factor = log_uniform(key, self.low, self.high)
        return TransformedTask(task, map_batch=Partial(_scale_inputs, factor))


class InitialScale(AbstractScaling):
    """Tasks whose initial parameters are multiplied by a log-uniform factor."""

    @override
    def change(self, task: AbstractTask, key: Key) -> TransformedTask:
        factor = log_uniform(key, self.low, self.high)
        return TransformedTask(task, map_initial=Partial(_scale, factor))


class Reparameterization(AbstractScaling):
    """Tasks in other units: parameters p' with p = s p', for log-uniform s.

    Losses are as before, gradients are s times and curvatures s^2 times as large. A drawn task's
    `map_params(p')` is p.

    Attributes:
        family: any family of tasks.
        low, high: the range of s.
        per: "task" for one s, "tensor" for one in each tensor, "parameter" for one in each entry.
    """

    per: Literal["parameter", "tensor", "task"] = eqx.field(static=True, default="tensor")

    @override
    def change(self, task: AbstractTask, key: Key) -> TransformedTask:
        tensors = jax.tree.leaves(jax.eval_shape(task.init, key))
        sizes = [tensor.size for tensor in tensors]
        count = {"task": 1, "tensor": len(tensors), "parameter": sum(sizes)}[self.per]
        factors: Any = log_uniform(key, self.low, self.high, (count,))
        if self.per == "parameter":
            parts = jnp.split(factors, list(itertools.accumulate(sizes))[:-1])
            shaped = zip(parts, tensors, strict=True)
            factors = tuple(part.reshape(tensor.shape) for part, tensor in shaped)
        return in_units(task, factors)


def in_units(task: AbstractTask, factors: Any) -> TransformedTask:
    """Returns a task in other units: its parameters times `factors` are those of `task`."""
    inverse = jax.tree.map(lambda factor: 1 / factor, factors)
    initial, params = (Partial(_scale, part) for part in (inverse, factors))
    return TransformedTask(task, map_initial=initial, map_params=params)


class LossScale(AbstractScaling):
    """Tasks whose losses are multiplied by a log-uniform factor."""

    @override
    def change(self, task: AbstractTask, key: Key) -> TransformedTask:
        factor = log_uniform(key, self.low, self.high)
        return TransformedTask(task, map_loss=Partial(_scale, factor))


class GradientNoise(AbstractScaling):
    """Tasks whose gradients carry normal noise of log-uniform standard deviation.

    Losses stay as they were.
    """

    @override
    def change(self, task: AbstractTask, key: Key) -> PerturbedTask:
        return PerturbedTask(task, log_uniform(key, self.low, self.high), jnp.zeros((), float))


class DelayedGradients(AbstractAugmentation):
    """Tasks whose gradients arrive up to `longest` steps late; until then they are zero.

    The delay of a task is any of 0, ..., longest, all alike. Its state keeps longest + 1 gradients.
    """

    longest: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        check_integer("DelayedGradients", "longest", self.longest, hint="longest=4")

    @override
    def change(self, task: AbstractTask, key: Key) -> DelayedTask:
        delay = random_index(key, jnp.asarray(self.longest + 1, jnp.int32))
        return DelayedTask(task, delay, self.longest)


class RandomDirections(AbstractRandomised):
    """A task, or the tasks of a family, with gradients along one random direction u in each step.

    In place of g it is d u (u . g) / |u|^2, of d parameters; the mean of that is g.
    """

    task: Any

    @override
    def change(self, grads: Params, key: Key) -> Params:
        flat, unravel = ravel_pytree(grads)
        direction = jax.random.normal(key, flat.shape, flat.dtype)
        along = jnp.vdot(direction, flat) / jnp.vdot(direction, direction)
        return unravel(flat.size * along * direction)


class LowPrecision(AbstractAugmentation):
    """Tasks that see rounded parameters and give rounded gradients.

    An optimizer's own parameters are not rounded. The derivative of rounding counts as one.

    Attributes:
        formats: of which each task has one, all alike.
    """

    formats: tuple[Literal["bfloat16", "float16", "float32", "float64"], ...] = eqx.field(
        static=True, default=("bfloat16", "float16", "float32")
    )

    def __check_init__(self) -> None:
        if not self.formats or not set(self.formats) <= set(_BITS):
            raise ValueError(
                f"LowPrecision(formats={self.formats!r}) must be some of {', '.join(_BITS)}."
            )

    @override
    def change(self, task: AbstractTask, key: Key) -> TransformedTask:
        which = random_index(key, jnp.asarray(len(self.formats), jnp.int32))
        return TransformedTask(task, map_params=_Rounding(which, self.formats))


# Bits of the exponent and of the mantissa.
_BITS = {"bfloat16": (8, 7), "float16": (5, 10), "float32": (8, 23), "float64": (11, 52)}


class _Rounding(eqx.Module):
    which: Int[Array, ""]
    formats: tuple[str, ...] = eqx.field(static=True)

    def __call__(self, params: Params) -> Params:
        def rounded(leaf: Array) -> Array:
            # Tangents and cotangents are rounded in the same way: JAX's derivative of this.
            each = [jax.lax.reduce_precision(leaf, *_BITS[name]) for name in self.formats]
            return jax.lax.select_n(self.which, *each) if each[1:] else each[0]

        return jax.tree.map(rounded, params)


class ReducedBatch(AbstractAugmentation):
    """Tasks on batches of `Rows` of which only the first few count, a log-uniform number of them.

    Whole splits stay whole.

    Attributes:
        smallest: the least number of examples that count.
    """

    smallest: int = eqx.field(static=True, default=1)

    def __check_init__(self) -> None:
        check_integer("ReducedBatch", "smallest", self.smallest, hint="smallest=1")

    @override
    def change(self, task: AbstractTask, key: Key) -> "ReducedTask":
        return ReducedTask(task, jax.random.uniform(key), self.smallest)


class ReducedTask(AbstractWrapped):
    """A task of which round(smallest^(1 - share) size^share) examples of each batch count."""

    task: AbstractTask
    share: Float[Array, ""]
    smallest: int = eqx.field(static=True)

    @override
    def batch(self, key: Key, split: Split = "train") -> Batch:
        def reduce(rows: Rows) -> Rows:
            size = len(jax.tree.leaves(rows.arrays)[0])
            least = math.log(min(self.smallest, size))
            count = jnp.round(jnp.exp(least + self.share * (math.log(size) - least)))
            counts = jnp.arange(size, dtype=jnp.int32) < count.astype(jnp.int32)
            weights = counts.astype(jnp.float32)
            own = weights if rows.weights is None else rows.weights * weights
            return dataclasses.replace(rows, weights=own)

        return _map_kind(Rows, reduce, self.task.batch(key, split))


class RandomLabels(AbstractAugmentation):
    """Tasks on `Labelled` data whose classes are permuted, and some labels drawn at random.

    Attributes:
        share: of the training labels that are random; other splits are permuted only.
    """

    share: float = eqx.field(static=True, default=0.0)

    def __check_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"RandomLabels(share={self.share!r}) must be in [0, 1]; try 0.5.")

    @override
    def change(self, task: AbstractTask, key: Key) -> AbstractTask:
        permutation_key, label_key, share_key = jax.random.split(key, 3)

        def change(data: Any) -> Data:
            count = jnp.asarray(data.num_classes, jnp.int32)
            permuted = jax.random.permutation(permutation_key, data.num_classes)

            def relabel(split: Split) -> Array:
                labels = data.split(split).arrays.labels
                fixed = permuted[labels].astype(labels.dtype)
                if split != "train" or self.share == 0:
                    return fixed
                drawn = random_index(label_key, count, labels.shape).astype(labels.dtype)
                changes = jax.random.uniform(share_key, labels.shape) < self.share
                return jnp.where(changes, drawn, fixed)

            labels = [relabel(split) for split in SPLITS]
            return eqx.tree_at(lambda d: [d.split(s).arrays.labels for s in SPLITS], data, labels)

        return _map_kind(Data, change, task)


class InputNoise(eqx.Module):
    """Adds normal noise to the inputs of a batch: `change` of `MetricObjective`.

    Attributes:
        scale: the standard deviation.
    """

    scale: float

    def __call__(self, key: Key, batch: Batch) -> Batch:
        """Returns the noisy batch."""

        def add(arrays: PyTree) -> PyTree:
            noise = optax.tree.random_like(key, arrays, jax.random.normal)
            return optax.tree.add_scale(arrays, self.scale, noise)

        return _map_inputs(add, batch)


def warm_start(task: AbstractTask, params: Params) -> TransformedTask:
    """Returns `task`, always begun from `params`, such as the end of a short run."""
    return TransformedTask(task, map_initial=Partial(_constant, params))


def _scale(factors: Any, tree: PyTree) -> PyTree:
    """Returns arrays times factors: one for all, or one or an array for each in tree order."""
    leaves, structure = jax.tree.flatten(tree)
    if not isinstance(factors, tuple):
        factors = jnp.broadcast_to(factors, (len(leaves),))
    scaled = [leaf * factors[i].astype(leaf.dtype) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, scaled)


def _map_kind(kind: type, function: Callable[[Any], Any], tree: PyTree) -> PyTree:
    """Returns a task or batch with its `Data` or `Rows` changed, wherever in it they are."""

    def change(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, kind) else leaf

    return jax.tree.map(change, tree, is_leaf=lambda leaf: isinstance(leaf, kind))


def _map_inputs(function: Callable[[PyTree], PyTree], batch: Batch) -> Batch:
    """Returns a batch with the floating-point arrays of its `Rows` changed."""

    def change(rows: Rows) -> Rows:
        floating, others = eqx.partition(rows.arrays, eqx.is_inexact_array)
        return dataclasses.replace(rows, arrays=eqx.combine(function(floating), others))

    return _map_kind(Rows, change, batch)


def _scale_inputs(factor: Float[Array, ""], batch: Batch) -> Batch:
    return _map_inputs(lambda arrays: _scale(factor, arrays), batch)


def _constant(params: Params, _: Params) -> Params:
    return params
