"""Pruning: what is left of an expression when one of its parts is left out.

Searches find the right structure with a passenger more often than by itself: a summand with a
factor of 1e-15, a tanh of something small. Leaving out each part in turn and fitting the constants
again finds the shorter expression, if there is one.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from lopt.symbolic.expression import Call, Constant, Expression, Node, renumbered
from lopt.symbolic.refit import refit
from lopt.symbolic.search import Candidate, Complexity, Front, judge, make_front
from lopt.symbolic.simplify import simplify
from lopt.symbolic.split import sample
from lopt.symbolic.table import Table

# Rounds of pruning, of expressions of so many nodes: longer ones have too many parts.
_ROUNDS, _LONGEST = 5, 30
# Evaluations of each fit while there are hundreds, and by what factor it may be hoped to lower a
# loss. What is left of an expression is tried on few rows first.
_EVALUATIONS, _HOPE = 20, 3.0
_TRIAL_EVALUATIONS, _TRIAL_ROWS = 4, 400


def prunings(expression: Expression) -> Iterator[Expression]:
    """Yields the expressions in which one call is replaced by one of its arguments.

    This leaves out a summand, a factor, a divisor, or a function around its argument; those that
    consist of a constant alone are not yielded.

    Example:
        >>> from lopt.symbolic.expression import Variable, make_expression
        >>> whole = make_expression(("add", 0.5, ("tanh", Variable("gradient"))))
        >>> [one.complexity for one in prunings(whole)]
        [2, 3]
    """
    constants = np.asarray(expression.constants, float).tolist()
    for root in _without_one(expression.root):
        if not isinstance(root, Constant):
            yield renumbered(root, constants)


def shortened(
    expressions: Iterable[Expression],
    table: Table,
    complexity: Complexity | None = None,
    allowed: Callable[[Expression], bool] = lambda expression: True,
) -> Front:
    """Returns the front of expressions and of their prunings, simplified and roughly fitted.

    Args:
        expressions: what searches found.
        table: the rows to fit, some thousands.
        complexity: the unit of length; nodes if not given.
        allowed: which expressions may be on the front. What is not may have a pruning that is.

    Raises:
        ValueError: if no expression is allowed and finite.
    """
    seen: set[tuple[Any, ...]] = set()

    def fresh(some: Iterable[Expression]) -> Iterator[Expression]:
        for one in map(simplify, some):
            key = one.root, *np.asarray(one.constants).tolist()
            if key not in seen and len(one.constants) <= min(len(table), _TRIAL_ROWS):
                seen.add(key)
                yield one

    def measured(some: Iterable[Expression]) -> list[Candidate]:
        return judge(some, {"train": table}, complexity)

    def fitted(some: Iterable[Expression]) -> list[Candidate]:
        return measured(refit(one, table, _EVALUATIONS) for one in some)

    given = list(expressions)
    whole = [one for one in given if allowed(one)]
    parts = [part for one in given if not allowed(one) for part in prunings(one) if allowed(part)]
    rough = measured(fresh([*whole, *parts]))
    front = make_front(rough)
    front = make_front([*rough, *fitted(_within_reach(rough, front))])
    few = sample(table, _TRIAL_ROWS, 0)
    pruned: set[int] = set()
    for _ in range(_ROUNDS):
        unpruned = [one for one in front.candidates if id(one) not in pruned]
        pruned |= {id(one) for one in unpruned}
        short = (one.expression for one in unpruned if one.expression.complexity <= _LONGEST)
        parts = [part for one in short for part in prunings(one) if allowed(part)]
        tried = measured(refit(one, few, _TRIAL_EVALUATIONS) for one in fresh(parts))
        front = make_front([*front.candidates, *fitted(_within_reach(tried, front))])
        # The last round found nothing that is shorter, or better.
        if all(id(one) in pruned for one in front.candidates):
            break
    return front


def _within_reach(candidates: Iterable[Candidate], front: Front) -> Iterator[Expression]:
    """Yields those that would be on a front if a fit lowered their loss by some factor."""
    for one in candidates:
        shorter = [two for two in front.candidates if two.complexity <= one.complexity]
        if not shorter or one.losses["train"] <= _HOPE * shorter[-1].losses["train"]:
            yield one.expression


def _without_one(node: Node) -> Iterator[Node]:
    if not isinstance(node, Call):
        return
    yield from node.arguments
    for place, argument in enumerate(node.arguments):
        before, after = node.arguments[:place], node.arguments[place + 1 :]
        for part in _without_one(argument):
            yield Call(node.operator, (*before, part, *after))
