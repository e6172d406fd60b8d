"""From a table to an equation: search, fit, prune, and choose.

Searches see some rows and propose; what they found by all seeds is pooled, simplified, fitted and
pruned. The front's constants are then fitted on all training rows, validation rows choose, and
test rows are only reported.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from lopt.core.checks import check_integer
from lopt.symbolic.expression import Expression, make_expression
from lopt.symbolic.operon import OperonSearch
from lopt.symbolic.prune import shortened
from lopt.symbolic.refit import refit
from lopt.symbolic.score import scores
from lopt.symbolic.search import AbstractSearch, Candidate, Complexity, Front, judge, make_front
from lopt.symbolic.select import output_variance, select
from lopt.symbolic.signs import is_odd
from lopt.symbolic.split import Splits, sample, split_by, split_table
from lopt.symbolic.table import Table

Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Distillation:
    """What came out.

    Attributes:
        front: with losses on "train", "validation" and "test".
        chosen: one of it.
        r_squared: of the chosen one, by the same names.
        splits: the rows of each.
    """

    front: Front
    chosen: Candidate
    r_squared: Mapping[str, float]
    splits: Splits


def distill(
    table: Table,
    searches: Sequence[AbstractSearch] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    *,
    rows: int = 2000,
    complexity: Complexity | None = None,
    odd: Collection[str] = (),
    longest: float | int | None = None,
    split: Sequence[str] | None = None,
    split_seed: int = 0,
    progress: Progress = lambda done, total, what: None,
) -> Distillation:
    """Finds short equations for the output of a table, and chooses one.

    Args:
        table: of recorded runs.
        searches: backends, each run with every seed; `OperonSearch()` if not given.
        seeds: of the searches and of the rows that they see.
        rows: how many those are. More make searches slow and seldom better.
        complexity: the unit of length; nodes if not given, of which a weight times a variable has
            three: `Complexity(weighted=True)` counts one.
        odd: the names of features that change sign with the gradient, such as momenta; the others,
            such as second moments, do not. If any is named, u(-g) = -u(g) is imposed: searches see
            each row and its mirror image, and only expressions are kept whose form is odd.
        longest: the greatest complexity that may be chosen; the front has longer ones all the same.
        split: "train", "validation" or "test" for each row; by runs and coordinates if not given.
        split_seed: of that split.
        progress: called with the numbers of finished and of all stages, and what comes next.

    Raises:
        ValueError: if there is no search or seed, a feature in `odd` is unknown, the table is too
            small for its splits, or its output is constant.
        ImportError: if a backend's library is not installed.
    """
    from threadpoolctl import threadpool_limits

    searches = (OperonSearch(),) if searches is None else searches
    if not searches or not seeds:
        raise ValueError("distill needs at least one of searches and of seeds; try seeds=(0, 1).")
    for search in searches:
        search.require()
    check_integer("distill", "rows", rows, 10, hint=2000)
    for seed in seeds:
        check_integer("distill", "seeds", seed, 0, 2**32 - 1, hint=0)
    names = {column.name for column in table.columns}
    if unknown := sorted(set(odd) - names):
        raise ValueError(
            f"distill(odd) names {', '.join(unknown)}; the table has {', '.join(sorted(names))}."
        )
    splits = split_table(table, split_seed) if split is None else split_by(table, split)
    for side in splits.mapping().values():
        output_variance(side)
    jobs = [(search, seed) for search in searches for seed in seeds]
    total = len(jobs) + 2
    found = [make_expression(0.0 if odd else float(splits.train.output.mean()))]
    for done, (search, seed) in enumerate(jobs):
        progress(done, total, f"{type(search).__name__}, seed {seed}")
        seen = sample(splits.train, rows, seed)
        found += search.search(mirrored(seen, odd) if odd else seen, seed)
    progress(len(jobs), total, "pruning")
    few = sample(splits.train, rows, split_seed)
    even = names - set(odd)

    def allowed(expression: Expression) -> bool:
        return not odd or is_odd(expression, odd, even)

    # Threads that wait for one another on a busy machine cost far more than they gain.
    with threadpool_limits(1):
        front = shortened(found, few, complexity, allowed)
        progress(len(jobs) + 1, total, "fitting on all rows")
        fitted = [refit(one.expression, splits.train) for one in front.candidates]
    # A constant that is fitted is odd no more.
    fitted = [
        new if allowed(new) else one.expression
        for new, one in zip(fitted, front.candidates, strict=True)
    ]
    front = make_front(judge(fitted, splits.mapping(), complexity))
    short = [one for one in front.candidates if longest is None or one.complexity <= longest]
    if not short:
        raise ValueError(
            f"distill(longest={longest}) leaves nothing to choose: the shortest expression found "
            f"has a complexity of {front.candidates[0].complexity:g}; try 50."
        )
    chosen = select(Front(tuple(short)), splits.validation)
    progress(total, total, "done")
    return Distillation(front, chosen, scores(chosen.expression, splits.mapping()), splits)


def mirrored(table: Table, odd: Collection[str]) -> Table:
    """Returns a table and its mirror image, in which odd features and the output are negated.

    Args:
        table: the rows.
        odd: the names of features that change sign with the gradient.
    """
    signs = np.asarray([-1.0 if column.name in odd else 1.0 for column in table.columns])
    both = table.take(np.tile(np.arange(len(table)), 2))
    side = np.repeat([False, True], len(table))
    return dataclasses.replace(
        both,
        values=np.where(side[:, None], both.values * signs, both.values),
        output=np.where(side, -both.output, both.output),
    )
