"""How much an equation explains, beside how much there is to explain.

R2 on every side of a split; a ceiling, which is what boosted trees explain of the same rows (Ke et
al. 2017, as scikit-learn has them); and what is lost without each feature. An equation far below
the ceiling is a poor equation, a low ceiling means that features or memory are missing.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lopt.core.checks import check_integer
from lopt.symbolic.expression import Constant, Expression, Node, Variable, with_leaves
from lopt.symbolic.refit import refit
from lopt.symbolic.select import output_variance, r_squared
from lopt.symbolic.table import Table

Predict = Callable[[Table], Float[np.ndarray, " row"]]


@dataclasses.dataclass(frozen=True)
class Loss:
    """What is lost of R2 without a feature; zero means that nothing is.

    Attributes:
        feature: its name; all its lags are left out together.
        replaced: when its values are spoilt and nothing else changes: set to their mean for an
            equation, shuffled for a ceiling. It may exceed one.
        refitted: when the constants may make up for it; None where that was not tried.
    """

    feature: str
    replaced: float
    refitted: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Ceiling:
    """What a black box explains.

    Attributes:
        scores: R2 by split.
        losses: of each feature.
        on_linear: whether its trees were fitted to what a linear fit leaves over.
    """

    scores: Mapping[str, float]
    losses: tuple[Loss, ...]
    on_linear: bool


def scores(expression: Expression, tables: Mapping[str, Table]) -> dict[str, float]:
    """Returns R2 by the names of tables.

    Raises:
        ValueError: if a table's output is constant.
    """
    return {name: r_squared(expression, table) for name, table in tables.items()}


def feature_names(columns: Sequence[Variable]) -> tuple[str, ...]:
    """Returns the features that columns are lags of, in the order of the columns."""
    return tuple(dict.fromkeys(one.name for one in columns))


def ablate(expression: Expression, train: Table, table: Table) -> tuple[Loss, ...]:
    """Measures what an equation loses without each feature of a table.

    Without a feature means: with every lag of it at its mean over `train`. Refitted means that all
    constants, and those that stand for these means, are then fitted to `train`; what such a fit
    loses on `table` counts up to what the mean output of `train` loses, as fits may have poles.

    Args:
        expression: it, fitted to `train`.
        train: to take means from and to fit on.
        table: to measure R2 on, such as the test side.

    Returns:
        One for each feature, in the order of the columns.
    """
    before = r_squared(expression, table)
    constant = _r_squared(table, np.full(len(table), np.mean(train.output, dtype=float)))
    found = []
    for name in feature_names(table.columns):
        gone = [one for one in expression.variables if one.name == name]
        if not gone:
            found.append(Loss(name, 0.0, 0.0))
            continue
        means = {one: float(np.mean(train.mapping()[one], dtype=float)) for one in gone}
        without = fix_variables(expression, means)
        fitted = refit(without, train)
        after = max(r_squared(fitted, table), constant)
        found.append(Loss(name, before - r_squared(without, table), before - after))
    return tuple(found)


def fix_variables(expression: Expression, values: Mapping[Variable, float]) -> Expression:
    """Returns an expression with some variables turned into constants.

    Each becomes one constant, wherever it stands.

    Example:
        >>> from lopt.symbolic.expression import make_expression
        >>> g, m = Variable("gradient"), Variable("momentum")
        >>> fixed = fix_variables(make_expression(("add", g, ("multiply", 2.0, m))), {m: 3.0})
        >>> fixed.variables, fixed.constants.tolist()
        ((Variable(name='gradient', lag=0),), [2.0, 3.0])
    """
    numbers = np.asarray(expression.constants, float).tolist()
    constants: dict[Variable, Constant] = {}

    def fixed(leaf: Node) -> Node:
        if isinstance(leaf, Variable) and leaf in values:
            if leaf not in constants:
                constants[leaf] = Constant(len(numbers))
                numbers.append(float(values[leaf]))
            return constants[leaf]
        return leaf

    root = with_leaves(expression.root, fixed)
    return Expression(root, jnp.asarray(np.asarray(numbers, float)))


def ceiling(
    tables: Mapping[str, Table], seed: int = 0, most: int = 500, repeats: int = 3
) -> Ceiling:
    """Fits a black box and scores it: boosted trees, alone or on what a linear fit leaves over.

    Trees draw straight lines badly, so without the second an equation may stand above its ceiling.
    Of the two, that with the better "validation" score is returned; both stop adding trees when
    "validation" no longer improves, so only "test" is unseen.

    Args:
        tables: "train", "validation" and any others, to be scored.
        seed: of the trees and of the shuffled features.
        most: trees.
        repeats: shuffles of each feature to average over; 0 for none, which saves half of the time.

    Returns:
        Its scores, and what "test", or else "validation", loses for each shuffled feature.

    Raises:
        ValueError: if "train" or "validation" is missing, or an output is constant.
    """
    check_integer("ceiling", "most", most, hint=500)
    for name in ("train", "validation"):
        if name not in tables:
            raise ValueError(f"ceiling(tables) has no {name!r}; there are {', '.join(tables)}.")
    fits = [_fit_trees(tables["train"], tables["validation"], on, seed, most) for on in (0, 1)]
    validated = [_r_squared(tables["validation"], fit(tables["validation"])) for fit in fits]
    best = int(np.argmax(validated))
    measured = tables.get("test", tables["validation"])
    return Ceiling(
        {name: _r_squared(table, fits[best](table)) for name, table in tables.items()},
        permutation_losses(fits[best], measured, seed, repeats) if repeats else (),
        bool(best),
    )


def permutation_losses(
    predict: Predict, table: Table, seed: int = 0, repeats: int = 3
) -> tuple[Loss, ...]:
    """Measures what any predictor loses for each feature whose rows are shuffled.

    Args:
        predict: from a table to outputs.
        table: to measure R2 on.
        seed: of the shuffles. All lags of a feature are shuffled alike.
        repeats: shuffles to average over.
    """
    generator = np.random.default_rng(seed)
    before = _r_squared(table, predict(table))
    found = []
    for name in feature_names(table.columns):
        places = [i for i, one in enumerate(table.columns) if one.name == name]
        lost = []
        for _ in range(repeats):
            values = table.values.copy()
            values[:, places] = values[generator.permutation(len(table))][:, places]
            shuffled = dataclasses.replace(table, values=values)
            lost.append(before - _r_squared(table, predict(shuffled)))
        found.append(Loss(name, float(np.mean(lost))))
    return tuple(found)


def _fit_trees(train: Table, validation: Table, linear: int, seed: int, most: int) -> Predict:
    from sklearn.ensemble import HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits

    inputs, scale = np.asarray(train.values, float), train.scale
    design = np.column_stack([np.ones(len(train)), inputs / scale])
    output = np.asarray(train.output, float)
    line = np.linalg.lstsq(design, output, rcond=1e-10)[0] * linear
    # Its thresholds are absolute; outputs of an optimizer may be of any size.
    unit = np.sqrt(output_variance(train))

    def straight(table: Table) -> Any:
        return np.column_stack([np.ones(len(table)), table.values / scale]) @ line

    model = HistGradientBoostingRegressor(max_iter=most, early_stopping=True, random_state=seed)
    # Threads that wait for one another on a busy machine cost far more than they gain.
    with threadpool_limits(1):
        model.fit(
            inputs,
            (output - straight(train)) / unit,
            X_val=np.asarray(validation.values, float),
            y_val=(validation.output - straight(validation)) / unit,
        )

    def predict(table: Table) -> Float[np.ndarray, " row"]:
        with threadpool_limits(1):
            rest = model.predict(np.asarray(table.values, float))
        return straight(table) + unit * rest

    return predict


def _r_squared(table: Table, predicted: Float[np.ndarray, " row"]) -> float:
    error = np.mean((np.asarray(predicted, float) - table.output) ** 2)
    return 1 - float(error) / output_variance(table)
