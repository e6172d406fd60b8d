"""Slices of the meta-loss around theta, in one and in two random directions."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from lopt.core.inner import InnerTraining
from lopt.core.types import Key, Theta
from lopt.core.unroll import Step, unroll
from lopt.experiment.trainings import over_devices


@dataclasses.dataclass(frozen=True)
class Slices:
    """The meta-loss of one episode around theta, at several lengths.

    Attributes:
        lengths: inner steps.
        line: distances along the first direction, in norms of theta; `losses` on it, per length.
        plane: distances along both; `surfaces` on it, None if theta has but one weight.
    """

    lengths: tuple[int, ...]
    line: Float[np.ndarray, " point"]
    losses: Float[np.ndarray, "length point"]
    plane: Float[np.ndarray, " place"]
    surfaces: Float[np.ndarray, "length place place"] | None


def loss_slices(
    inner: InnerTraining,
    theta: Theta,
    key: Key,
    lengths: Sequence[int],
    points: int = 101,
    grid: int = 21,
) -> Slices:
    """Computes the meta-loss of one episode along one random direction, and two.

    All lengths come from the same runs. Directions have the norm of theta (or 1, if it is zero)
    and are orthogonal; distances go from -1 to 1.

    Args:
        inner: what is measured; its horizon does not matter.
        theta: the middle.
        key: of the episode and of the directions.
        lengths: inner steps.
        points: places on the line.
        grid: places on each side of the plane.
    """
    lengths = tuple(sorted(set(lengths)))
    if not lengths or lengths[0] < 1:
        raise ValueError(f"lengths={lengths} must be positive numbers of inner steps.")
    direction_key, episode_key = jax.random.split(key)
    flat, unravel = ravel_pytree(theta)
    directions = _directions(direction_key, flat)

    def losses(shared: Any, place: Float[Array, " axis"]) -> Float[Array, " length"]:
        inner, flat = shared
        theta = unravel(flat + place @ directions)
        ends = jnp.asarray(lengths, jnp.int32)
        episode = inner.begin(theta, episode_key, ends[-1])
        task = inner.tasks.draw(episode.task_key)
        optimizer = inner.learned.optimizer(theta, ends[-1])

        def record(step: Step) -> Float[Array, " length"]:
            return jnp.stack([inner.objective(task, step, end) for end in ends])

        _, run = unroll(task, optimizer, episode.train, lengths[-1], record=record)
        return jnp.stack([run[:n, i].mean() for i, n in enumerate(lengths)])

    run = over_devices(losses, (inner, flat), 64)

    def at(places: np.ndarray) -> np.ndarray:
        return run(places.astype(flat.dtype)).astype(float).T

    line, plane = np.linspace(-1, 1, points), np.linspace(-1, 1, grid)
    on_line = np.zeros((points, len(directions)))
    on_line[:, 0] = line
    surfaces = None
    if len(directions) == 2:
        places = np.stack(np.meshgrid(plane, plane, indexing="xy"), axis=-1).reshape(-1, 2)
        surfaces = at(places).reshape(len(lengths), grid, grid)
    return Slices(lengths, line, at(on_line), plane, surfaces)


def _directions(key: Key, flat: Float[Array, " weight"]) -> Float[Array, "axis weight"]:
    drawn = jax.random.normal(key, (flat.size, min(2, flat.size)), flat.dtype)
    norm = jnp.linalg.norm(flat)
    return jnp.linalg.qr(drawn)[0].T * jnp.where(norm > 0, norm, 1)
