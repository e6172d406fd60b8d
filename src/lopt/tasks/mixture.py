"""Mixtures of tasks of any kind."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree
from typing_extensions import override

from lopt.core.task import AbstractTask, AbstractTaskFamily
from lopt.core.types import Key
from lopt.tasks.data import Examples
from lopt.tasks.ranges import random_index


class Mixture(AbstractTaskFamily):
    """Draws a task of one of several families.

    Families that agree in everything but the values of arrays and the number of examples are one
    architecture: one compiled program trains any of them, each as likely as the others. `draw`
    chooses among the families of one architecture. Estimators of a mixture of several are wrapped
    in `lopt.Mean`, which compiles each architecture once and shares particles equally among them.

    Attributes:
        groups: a family for each architecture.

    Example:
        >>> import lopt
        >>> data = lopt.load_images("digits")
        >>> small, large = (lopt.tasks.mlp_classification(data, (width,)) for width in (8, 64))
        >>> family = lopt.tasks.Mixture([small, large, lopt.tasks.QuadraticFamily(10)])
        >>> len(family.architectures())
        3
    """

    groups: tuple[AbstractTaskFamily, ...]

    def __init__(self, families: Sequence[AbstractTaskFamily]) -> None:
        if not families:
            raise ValueError("Mixture(families=()) must have at least one; try Mixture([task]).")
        kinds: list[Any] = []
        members: list[list[AbstractTaskFamily]] = []
        for family in (part for one in families for part in one.architectures()):
            kind = _architecture(family)
            if kind not in kinds:
                kinds.append(kind)
                members.append([])
            members[kinds.index(kind)].append(family)
        self.groups = tuple(_Alike(alike) if alike[1:] else alike[0] for alike in members)

    @override
    def architectures(self) -> tuple[AbstractTaskFamily, ...]:
        return self.groups

    @override
    def draw(self, key: Key) -> AbstractTask:
        if len(self.groups) > 1:
            raise ValueError(
                f"Mixture(families) has {len(self.groups)} architectures, and one program draws "
                "tasks of one; wrap the estimator in lopt.Mean, or try Mixture.architectures()."
            )
        return self.groups[0].draw(key)


class _Alike(AbstractTaskFamily):
    """Families of one architecture, their examples joined.

    Attributes:
        joined: a family that holds the examples of all, and the arrays of the first.
        options: for each leaf of it what to choose from: a window, an array, or nothing.
        count: the number of families.
    """

    joined: AbstractTaskFamily
    options: tuple[PyTree, ...]
    count: int = eqx.field(static=True)

    def __init__(self, families: Sequence[AbstractTaskFamily]) -> None:
        leaves, structures = zip(*map(_flatten, families), strict=True)
        joined = [_join(parts) for parts in zip(*leaves, strict=True)]
        self.joined = structures[0].unflatten([leaf for leaf, _ in joined])
        self.options = tuple(option for _, option in joined)
        self.count = len(families)

    @override
    def draw(self, key: Key) -> AbstractTask:
        which = random_index(key, jnp.asarray(self.count, jnp.int32))
        leaves, structure = _flatten(self.joined)
        for i, option in enumerate(self.options):
            chosen = jax.tree.map(lambda choices: choices[which], option)
            if _is_examples(leaves[i]):
                leaves[i] = Examples(leaves[i].arrays, chosen[0], chosen[1], leaves[i].length)
            elif chosen is not None:
                leaves[i] = chosen
        return structure.unflatten(leaves).draw(jax.random.fold_in(key, 1))


def _join(parts: Sequence[Any]) -> tuple[Any, PyTree]:
    """Returns what is joined of one leaf of several families, and what to choose from it."""
    if eqx.is_array(parts[0]):
        return parts[0], jnp.stack(parts)
    if not _is_examples(parts[0]):
        return parts[0], None
    lengths = jnp.array([len(jax.tree.leaves(part.arrays)[0]) for part in parts], jnp.int32)
    first = jnp.cumsum(lengths) - lengths + jnp.stack([part.first for part in parts])
    count = jnp.stack([part.count for part in parts])
    # Until a family is chosen the window is that of the smallest, for checks to go by.
    smallest = jnp.argmin(count)
    arrays = jax.tree.map(lambda *rows: jnp.concatenate(rows), *(part.arrays for part in parts))
    joined = Examples(arrays, first[smallest], count[smallest], parts[0].length)
    return joined, (first, count)


def _architecture(family: AbstractTaskFamily) -> tuple[Any, list[Any]]:
    """Returns what compiled programs depend on; for examples, all but their number."""
    leaves, structure = _flatten(family)
    kinds: list[Any] = []
    for leaf in leaves:
        if _is_examples(leaf):
            rows = [(row.shape[1:], row.dtype) for row in jax.tree.leaves(leaf.arrays)]
            kinds.append((jax.tree.structure(leaf.arrays), rows, leaf.length))
        else:
            kinds.append((leaf.shape, leaf.dtype) if eqx.is_array(leaf) else leaf)
    return structure, kinds


def _flatten(family: AbstractTaskFamily) -> tuple[list[Any], Any]:
    return jax.tree.flatten(family, is_leaf=_is_examples)


def _is_examples(leaf: object) -> bool:
    return isinstance(leaf, Examples)
