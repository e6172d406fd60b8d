"""Noise at a frozen checkpoint: how gradients, and the updates made of them, vary across batches.

Tail index by the estimator of Mohammadi et al. 2015 (Metrika 78) as Simsekli et al. 2019
(arXiv:1901.06053) use it; covariance by its trace and its spectrum. The optimizer's state is
frozen with the params: what varies is the batch alone.
"""

import math
from typing import Any, Literal, TypeAlias

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from lopt.analysis.dynamics.checks import check_optimizer
from lopt.core.checks import check_integer, check_key, is_real
from lopt.core.estimator import AbstractGradientEstimator
from lopt.core.types import Key, Params
from lopt.core.unroll import TrainState

Grouping = Literal["values", "samples"]
Vectors: TypeAlias = PyTree[Float[Array | np.ndarray, "..."]]


class Samples(eqx.Module):
    """What a frozen checkpoint answers to several batches, or to one.

    Attributes:
        losses: one for each.
        grads, updates: pytrees like params, with a leading axis of samples.
    """

    losses: Float[Array, "*sample"]
    grads: Params
    updates: Params


class Noise(eqx.Module):
    """What is known of the noise of one kind of vector, over coordinates that have any.

    Attributes:
        tail_index: alpha; 2 for Gaussian noise, smaller for heavier tails.
        trace: of the covariance, the mean squared distance from the mean.
        top_eigenvalue: the variance along the direction in which it is largest.
        mean_norm: Euclidean norm of the mean.
        silent: how many coordinates are the same in every sample.
    """

    tail_index: float
    trace: float
    top_eigenvalue: float
    mean_norm: float
    silent: int


@eqx.filter_jit
def noise_samples(
    estimator: AbstractGradientEstimator,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    key: Key,
    num: int,
) -> Samples:
    """Returns the gradients of several batches at a checkpoint, and what becomes of each of them.

    Every sample starts from the same params, optimizer state and estimator state. The batch size is
    the task's: one with batches of a single example gives the noise of examples.

    Args:
        estimator: a task, or any other.
        optimizer: with which `state` was made.
        state: the checkpoint, from `start` or `unroll`.
        key: of the batches.
        num: how many, at least 2.

    Raises:
        TypeError: if `optimizer` or `key` is none.
        ValueError: if `num` is not an integer of at least 2, or the state is another optimizer's.
    """
    check_key("noise_samples", key)
    check_optimizer("noise_samples", "optimizer", optimizer)
    check_integer("noise_samples", "num", num, 2, hint=64)
    expected: Any = jax.tree.structure(jax.eval_shape(optimizer.init, state.params))
    if expected != jax.tree.structure(state.opt_state):
        raise ValueError(
            f"noise_samples(state): its opt_state has structure "
            f"{jax.tree.structure(state.opt_state)}, but this optimizer's has {expected}; pass the "
            "optimizer that the run was trained with."
        )
    optimizer = optax.with_extra_args_support(optimizer)

    def sample(key: Key) -> Samples:
        estimate, _ = estimator.estimate(state.params, state.estimator_state, key)
        updates, _ = optimizer.update(
            estimate.grads, state.opt_state, state.params, value=estimate.loss
        )
        return Samples(estimate.loss, estimate.grads, updates)

    return jax.lax.map(sample, jax.random.split(key, num))


def noise_of(vectors: Vectors, grouping: Grouping = "values") -> Noise:
    """Returns tail index and covariance of samples of a vector: of gradients, or of updates.

    Args:
        vectors: a pytree of arrays with a leading axis of samples, such as `Samples.grads`.
        grouping: see `tail_index`.

    Raises:
        ValueError: if there is only one sample, if one is not finite, or no coordinate varies.
    """
    matrix = flatten_samples(vectors)
    if len(matrix) < 2:
        raise ValueError(f"noise_of(vectors) has {len(matrix)} sample; try 64.")
    finite = np.isfinite(matrix).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"noise_of(vectors) are not finite in {np.sum(~finite)} of {len(matrix)} samples; try "
            "a checkpoint from before training diverged."
        )
    mean = matrix.mean(axis=0)
    varies = np.any(matrix != matrix[0], axis=0)
    if not varies.any():
        raise ValueError("noise_of(vectors) are the same in every sample: there is no noise.")
    noise = (matrix - mean)[:, varies]
    spectrum = covariance_spectrum(noise)
    return Noise(
        tail_index=tail_index(noise, grouping),
        trace=float(spectrum.sum()),
        top_eigenvalue=float(spectrum[0]),
        mean_norm=float(np.linalg.norm(mean)),
        silent=int(np.sum(~varies)),
    )


def tail_index(
    noise: Float[np.ndarray, "sample coordinate"],
    grouping: Grouping = "values",
    floor: float = 0.0,
) -> float:
    """Returns the tail index alpha of noise, which is taken to be centred and alpha-stable.

    Sums of m stable variables are m^(1 / alpha) times one of them, so that with sums Y of m values

        1 / alpha = (mean ln |Y| - mean ln |X|) / ln m

    Args:
        noise: a row for each sample.
        grouping: what is summed. "values", as published: all values end to end, row by row, with m
            the largest divisor of their number not above its root. This takes coordinates for
            independent and equally large, and where they are not, alpha says that too. "samples":
            the same coordinate in m samples, m the largest divisor of their number not above its
            root; only samples need to be independent.
        floor: what is added to absolute values before their logarithm. Published code adds 2.2e-16,
            so that each coordinate without noise counts with a logarithm of -36 and alpha falls far
            below 1. By default exact zeros are left out.

    Raises:
        ValueError: if the number of values, or of samples, has no divisor to make sums of, or if
            there is no noise: it, or all of its sums, are zero, or not finite.

    Reference: Simsekli et al. 2019, arXiv:1901.06053, section 4.

    Example:
        >>> import numpy as np
        >>> from lopt.analysis.dynamics import tail_index
        >>> print(f"{tail_index(np.random.default_rng(0).normal(size=(100, 10000))):.1f}")
        2.0
    """
    if grouping not in ("values", "samples"):
        raise ValueError(f"tail_index(grouping={grouping!r}) must be 'values' or 'samples'.")
    if not is_real(floor) or not 0 <= floor < math.inf:
        raise ValueError(
            f"tail_index(floor={floor!r}) must be a finite number and not negative; try 0."
        )
    if not np.isfinite(noise).all() or not noise.any():
        raise ValueError(
            "tail_index(noise) must be finite, and not zero everywhere; try samples of more "
            "batches, less their mean."
        )
    # Sums run over the first axis, which is one column of all values or one column per coordinate.
    columns = noise.reshape(-1, 1) if grouping == "values" else noise
    count = len(columns)
    size = max((m for m in range(1, math.isqrt(count) + 1) if count % m == 0), default=1)
    if size < 2:
        raise ValueError(
            f"tail_index(noise): {count} {grouping} cannot be cut into equal sums; leave one out, "
            "or take 64 samples."
        )
    sums = columns.reshape(count // size, size, -1).sum(axis=1)
    if not sums.any() and not floor:
        raise ValueError(
            f"tail_index(noise) has sums of {size} {grouping} that are all zero, as where what "
            "cancels is side by side; try grouping='samples', or other samples."
        )
    difference = _mean_logarithm(sums, floor) - _mean_logarithm(columns, floor)
    return float(math.log(size) / difference)


def covariance_spectrum(
    vectors: Float[np.ndarray, "sample coordinate"],
) -> Float[np.ndarray, " eigenvalue"]:
    """Returns the eigenvalues of the covariance of samples, largest first, that can be nonzero.

    They are those of the Gram matrix of centred samples, or of the covariance itself if that is
    smaller; divided by one less than the number of samples, so that their sum is an unbiased trace.

    Raises:
        ValueError: if `vectors` are not at least two rows of finite numbers.
    """
    if vectors.ndim != 2 or len(vectors) < 2 or not np.isfinite(vectors).all():
        raise ValueError(
            f"covariance_spectrum(vectors) must be two rows or more of finite numbers; they have "
            f"shape {vectors.shape}. Try flatten_samples(noise_samples(...).grads)."
        )
    centred = vectors - vectors.mean(axis=0)
    few = len(centred) <= centred.shape[1]
    gram = (centred @ centred.T if few else centred.T @ centred) / (len(centred) - 1)
    # The mean took one dimension; rounding may leave the zeros slightly negative.
    return np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)


def flatten_samples(vectors: Vectors) -> Float[np.ndarray, "sample coordinate"]:
    """Returns a pytree of arrays with a leading axis of samples as a matrix, a row for each.

    Raises:
        ValueError: if leading axes differ.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(vectors)]
    lengths = {leaf.shape[:1] for leaf in leaves}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"These arrays have shapes {[leaf.shape for leaf in leaves]}, and not one number of "
            "samples in front; try noise_samples(...).grads."
        )
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def _mean_logarithm(values: np.ndarray, floor: float) -> float:
    sizes = np.abs(values) + floor
    return float(np.mean(np.log(sizes[sizes > 0])))
