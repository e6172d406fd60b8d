"""Two numbers that describe an optimizer: how far back it looks, and how complicated its map is.

Zheng et al. 2022 (arXiv:2203.06578) report both, as temporal perception field and mapping
complexity, and publish no definition that a program could follow. These are ours: a mean lag,
weighted by how strongly the output depends on it, and the size of the smallest approximation.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lopt.core.checks import check_integer, is_real
from lopt.symbolic.expression import Expression, Variable
from lopt.symbolic.score import feature_names
from lopt.symbolic.search import Front
from lopt.symbolic.select import output_variance
from lopt.symbolic.table import Table

History = Float[Array, "lag feature"]


@dataclasses.dataclass(frozen=True, eq=False)
class Perception:
    """How an output depends on the past of one feature, f.

    The importance of a lag is `I_tau = E|du/df_{t-tau}| std(f_{t-tau})`, over rows.

    Attributes:
        feature: its name.
        importance: of each lag, the present first.
    """

    feature: str
    importance: Float[np.ndarray, " lag"]

    @property
    def field(self) -> float:
        """The temporal perception field, in steps: `sum (tau + 1) I_tau / sum I_tau`.

        One if only the present counts, zero if the feature does not count at all.
        """
        total = float(self.importance.sum())
        return float(np.arange(1, len(self.importance) + 1) @ self.importance) / (total or 1.0)

    @property
    def participation(self) -> float:
        """The number of lags that take part, `(sum I)^2 / sum I^2`: one to all, zero if none."""
        square = float(np.sum(self.importance**2))
        return float(self.importance.sum()) ** 2 / (square or 1.0)


def perception_of_expression(expression: Expression, table: Table) -> tuple[Perception, ...]:
    """Measures the perception of every feature by an equation, with exact derivatives.

    Lags that are no columns of the table have no importance. Memory inside of features, such as
    that of a momentum, is not counted; compare only what has the same features.

    Args:
        expression: over columns of the table.
        table: the rows to average over.
    """
    columns = {one: jnp.asarray(np.asarray(x, float)) for one, x in table.mapping().items()}
    deviations = np.std(np.asarray(table.values, float), axis=0)
    spread = dict(zip(table.columns, deviations, strict=True))
    rows = len(table)

    def values(used: Any) -> Any:
        return jnp.broadcast_to(expression({**columns, **used}), (rows,))

    # Rows do not mix: pulled back, ones are the derivatives of every row by its own columns.
    used = {one: columns[one] for one in expression.variables}
    outputs, pull = jax.vjp(values, used)
    (slopes,) = pull(jnp.ones_like(outputs))
    importance = {
        one: float(np.mean(np.abs(slope), dtype=float)) * float(spread[one])
        for one, slope in slopes.items()
    }
    return tuple(
        Perception(
            name,
            np.asarray(
                [importance.get(Variable(name, lag), 0.0) for lag in range(_length(table, name))]
            ),
        )
        for name in feature_names(table.columns)
    )


def perception_of_network(
    network: Callable[[History], Float[Array, ""]],
    histories: Float[Array, "row lag feature"],
    names: Sequence[str],
    rows_at_once: int = 256,
) -> tuple[Perception, ...]:
    """Measures the perception of every feature by a network with memory, with exact derivatives.

    Args:
        network: from one history of features, the present first, to the output; `remember` makes
            it of a step with memory.
        histories: of recorded coordinates, as from `to_histories`.
        names: of the features.
        rows_at_once: how many rows to differentiate in parallel.

    Raises:
        ValueError: if the names do not fit the histories.
    """
    if len(names) != histories.shape[2]:
        raise ValueError(
            f"perception_of_network(names={tuple(names)!r}) does not fit histories of "
            f"{histories.shape[2]} features; name each of them."
        )
    slopes = jax.lax.map(jax.grad(network), histories, batch_size=rows_at_once)
    spread = np.std(np.asarray(histories, float), axis=0)
    importance = np.mean(np.abs(np.asarray(slopes, float)), axis=0) * spread
    return tuple(Perception(name, importance[:, i]) for i, name in enumerate(names))


def remember(
    step: Callable[[Any, Float[Array, " feature"]], tuple[Any, Float[Array, ""]]], state: Any
) -> Callable[[History], Float[Array, ""]]:
    """Unrolls a step with memory in time.

    Args:
        step: (memory, features) to the next memory and the output.
        state: the memory at the beginning.

    Returns:
        The last output as a function of the history of features, the present first.

    Example:
        >>> average = remember(lambda m, g: (0.5 * m + g[0], 0.5 * m + g[0]), 0.0)
        >>> float(average(jnp.asarray([[1.0], [2.0], [4.0]])))
        3.0
    """

    def network(history: History) -> Float[Array, ""]:
        _, outputs = jax.lax.scan(step, state, history, reverse=True)
        # Scanned backwards: the present, which comes last, is at place 0.
        return outputs[0]

    return network


def to_histories(table: Table) -> tuple[tuple[str, ...], Float[Array, "row lag feature"]]:
    """Returns the features of a table, and its rows as histories, the present first.

    Raises:
        ValueError: if features have gaps in their lags or different numbers of them.
    """
    names = feature_names(table.columns)
    lags = _length(table, names[0])
    place = {one: i for i, one in enumerate(table.columns)}
    every = [Variable(n, lag) for n in names for lag in range(max(lags, _length(table, n)))]
    if missing := [str(one) for one in every if one not in place]:
        raise ValueError(
            f"to_histories: there is no column {missing[0]}; record every feature with all of its "
            "lags and equally many."
        )
    order = [[place[Variable(name, lag)] for name in names] for lag in range(lags)]
    return names, jnp.asarray(table.values[:, np.asarray(order)])


def equation_complexity(front: Front, table: Table, least: float, split: str = "train") -> float:
    """Returns the smallest complexity on a front that reaches a certain R2; infinite if none does.

    Args:
        front: with losses on the split.
        table: that split's rows; its output's variance is what R2 compares with.
        least: the R2 to reach.
        split: which losses to take.
    """
    _check_least("equation_complexity", least)
    allowed = (1 - least) * output_variance(table)
    return min(
        (one.complexity for one in front.candidates if one.losses[split] <= allowed),
        default=math.inf,
    )


def network_complexity(
    tables: Mapping[str, Table],
    least: float,
    widths: Sequence[int] = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32),
    seed: int = 0,
    tries: int = 2,
    most: int = 300,
) -> float:
    """Returns the weights of the smallest network that reaches a certain R2; infinite if none does.

    Networks have one hidden layer of tanh and are fitted to "train" by L-BFGS; R2 is that of
    "validation". Inputs are brought to size one.

    Args:
        tables: "train" and "validation".
        least: the R2 to reach.
        widths: of the hidden layer, to be tried in this order.
        seed: of the first weights.
        tries: fits of each width, from other first weights; one that reaches it is enough.
        most: iterations of a fit.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPRegressor
    from threadpoolctl import threadpool_limits

    _check_least("network_complexity", least)
    check_integer("network_complexity", "tries", tries, hint=2)
    train, validation = tables["train"], tables["validation"]
    mean, unit = np.mean(train.output, dtype=float), math.sqrt(output_variance(train))
    allowed = (1 - least) * output_variance(validation)
    for width in widths:
        for attempt in range(tries):
            model = MLPRegressor(
                hidden_layer_sizes=(width,), activation="tanh", solver="lbfgs", alpha=1e-9,
                max_iter=most, max_fun=20 * most, tol=1e-9, random_state=seed + attempt,
            )  # fmt: skip
            with warnings.catch_warnings(), threadpool_limits(1):
                # A fit that could go on is judged like any other.
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(train.values / train.scale, (train.output - mean) / unit)
            predicted = mean + unit * model.predict(validation.values / train.scale)
            if np.mean((predicted - validation.output) ** 2) <= allowed:
                return float(sum(part.size for part in (*model.coefs_, *model.intercepts_)))
    return math.inf


def _check_least(owner: str, least: float) -> None:
    if not is_real(least) or not least < 1:
        raise ValueError(f"{owner}(least={least!r}) must be an R2 below 1; try 0.95.")


def _length(table: Table, name: str) -> int:
    return 1 + max(one.lag for one in table.columns if one.name == name)
