"""Families of tasks made of other families (Metz et al. 2020, arXiv:2009.11243).

Each draws a task of an inner family and changes something about it, by an amount that is an array:
one compiled program trains many different tasks side by side. They nest in any order.
"""

import abc
import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree
from typing_extensions import override

from lopt.core.checks import check_integer
from lopt.core.task import AbstractTask, AbstractTaskFamily, TransformedTask
from lopt.core.types import Key, Params
from lopt.tasks.data import Data, Rows
from lopt.tasks.ranges import check_range, log_uniform, random_index


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
    """

    size: int = eqx.field(static=True)

    def __check_init__(self) -> None:
        check_integer("DataSubset", "size", self.size, hint="size=100")
        found = [leaf for leaf in jax.tree.leaves(self.family, is_leaf=_is_data) if _is_data(leaf)]
        if not found:
            kind = type(self.family).__name__
            raise ValueError(f"DataSubset(family={kind}(...)) has no data; try mlp_classification.")
        for data in found:
            if self.size < (data.train.length or 1):
                raise ValueError(
                    f"DataSubset(size={self.size}) is shorter than an example, of "
                    f"{data.train.length} tokens; try size={100 * data.train.length}."
                )
            # Inside a compiled function the count may be unknown; `draw` then keeps to it.
            if not isinstance(data.train.count, jax.core.Tracer) and self.size > data.train.count:
                raise ValueError(
                    f"DataSubset(size={self.size}) must not exceed the {data.train.count} examples "
                    f"of the training split; try size={data.train.count}."
                )

    @override
    def change(self, task: AbstractTask, key: Key) -> AbstractTask:
        def narrow(leaf: Any) -> Any:
            if not _is_data(leaf):
                return leaf
            size = jnp.minimum(jnp.asarray(self.size, jnp.int32), leaf.train.count)
            first = leaf.train.first + random_index(key, leaf.train.count - size + 1)
            return eqx.tree_at(lambda d: (d.train.first, d.train.count), leaf, (first, size))

        return jax.tree.map(narrow, task, is_leaf=_is_data)


class InputScale(AbstractScaling):
    """Tasks whose inputs are multiplied by a log-uniform factor between `low` and `high`.

    Inputs are the floating-point arrays of a batch of `Rows`, such as images.
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
        per: "task" for one s, "tensor" for one in each tensor of the parameters.
    """

    per: Literal["tensor", "task"] = eqx.field(static=True, default="tensor")

    @override
    def change(self, task: AbstractTask, key: Key) -> TransformedTask:
        tensors = jax.tree.leaves(jax.eval_shape(task.init, key))
        count = {"task": 1, "tensor": len(tensors)}[self.per]
        factors = log_uniform(key, self.low, self.high, (count,))
        initial, params = (Partial(_scale, part) for part in (1 / factors, factors))
        return TransformedTask(task, map_initial=initial, map_params=params)


def warm_start(task: AbstractTask, params: Params) -> TransformedTask:
    """Returns `task`, always begun from `params`, such as the end of a short run."""
    return TransformedTask(task, map_initial=Partial(_constant, params))


def _scale(factors: Float[Array, "..."], tree: PyTree) -> PyTree:
    """Returns arrays times factors: one for all of them, or one for each in tree order."""
    leaves, structure = jax.tree.flatten(tree)
    factors = jnp.broadcast_to(factors, (len(leaves),))
    scaled = [leaf * factors[i].astype(leaf.dtype) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, scaled)


def _scale_inputs(factor: Float[Array, ""], rows: Rows) -> Rows:
    floating, others = eqx.partition(rows.arrays, eqx.is_inexact_array)
    return Rows(eqx.combine(_scale(factor, floating), others), rows.weights, rows.key)


def _constant(params: Params, _: Params) -> Params:
    return params


def _is_data(leaf: object) -> bool:
    return isinstance(leaf, Data)
