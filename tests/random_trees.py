"""Random expressions and samples, for tests of what reads, prints and rewrites them."""

import numpy as np

from lopt.symbolic.expression import Expression, Variable, evaluate, make_expression
from lopt.symbolic.operators import OPERATORS

FEATURES = (Variable("gradient"), Variable("m", 1), Variable("momentum_0.9"))


def random_expression(seed, depth=5, operators=tuple(OPERATORS)):
    """An expression that uses at least one feature."""
    generator = np.random.default_rng(seed)

    def tree(depth):
        if depth == 0 or generator.random() < 0.15:
            if generator.random() < 0.35:
                choices = (0.0, 1.0, -1.0, 2.0, float(generator.normal()))
                return choices[generator.integers(5)]
            return FEATURES[generator.integers(3)]
        name = operators[generator.integers(len(operators))]
        return (name, *(tree(depth - 1) for _ in range(OPERATORS[name].arity)))

    expression = make_expression(tree(depth))
    return (
        expression if expression.variables else random_expression(seed + 10_000, depth, operators)
    )


def samples(seed=0, rows=64, scale=1.0, dtype=float):
    generator = np.random.default_rng(seed)
    return {one: (scale * generator.standard_normal(rows)).astype(dtype) for one in FEATURES}


def value(expression, columns, constants=None):
    constants = np.asarray(expression.constants, float) if constants is None else constants
    rows = len(next(iter(columns.values())))
    with np.errstate(all="ignore"):
        return np.broadcast_to(evaluate(expression.root, constants, columns), (rows,))


def well_posed(expression, columns, bound=1e8):
    """Rows on which rounding does not show: not near a jump, no cancellation, no overflow."""
    generator = np.random.default_rng(1)
    here = value(expression, columns)
    good = np.isfinite(here) & (np.abs(here) < bound)
    for _ in range(3):
        near = {k: x * (1 + 1e-12 * generator.standard_normal(len(x))) for k, x in columns.items()}
        constants = np.asarray(expression.constants, float)
        constants = constants * (1 + 1e-12 * generator.standard_normal(len(constants)))
        with np.errstate(all="ignore"):
            moved = np.abs(value(expression, near, constants) - here)
            good &= moved < 1e-9 * np.maximum(np.abs(here), 1e-6)
    return good


def assert_same(found, expected, rows=slice(None), tolerance=1e-8, message=""):
    found, expected = np.broadcast_to(found, expected.shape)[rows], expected[rows]
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=1e-10, err_msg=message)


def sampled(expression: Expression):
    """Samples at three scales, and where an expression is well posed on them."""
    for scale in (0.01, 1.0, 3.0):
        columns = samples(scale=scale)
        yield columns, well_posed(expression, columns)
