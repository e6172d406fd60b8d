"""Simplification: cheap rewriting, SymPy's within a time limit, and rounding that is checked.

SymPy's simplification has no bound on its time, so it runs in a process of its own that is killed
when its time is over; whatever it returns is compared with the original on sample values.
"""

import json
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from lopt.symbolic.algebra import sympy_module
from lopt.symbolic.expression import Expression, Variable, evaluate
from lopt.symbolic.rewrite import rewrite
from lopt.symbolic.serial import from_json, to_json
from lopt.symbolic.signs import is_odd
from lopt.symbolic.typeset import significant

__all__ = ["agree", "is_odd", "rounded", "simplify"]

# JSON in, JSON out: the other process evaluates no string either.
WORKER = """
import json, os, sys
sys.path[:] = json.loads(sys.argv[1])
os.environ["JAX_PLATFORMS"] = "cpu"
from lopt.symbolic.algebra import simplified
from lopt.symbolic.serial import from_json, to_json
json.dump(to_json(simplified(from_json(json.load(sys.stdin)))), sys.stdout)
"""


def simplify(expression: Expression, seconds: float = 0.0) -> Expression:
    """Returns an expression with the same values and at most as many nodes.

    Values are the same up to rounding wherever no guard of an operator acts.

    Args:
        expression: what to simplify.
        seconds: how long SymPy may try to do better than the cheap rules; 0 for not at all. The
            start of its process takes two or three of them.

    Raises:
        ValueError: if the seconds are negative.
        ImportError: if SymPy is wanted and missing.

    Example:
        >>> from lopt.symbolic.expression import make_expression
        >>> from lopt.symbolic.typeset import to_text
        >>> rule = ("multiply", -1.0, ("tanh", ("multiply", -3.0, Variable("m"))))
        >>> to_text(simplify(make_expression(rule)))
        'tanh(3 * m)'
    """
    if not seconds >= 0:
        raise ValueError(f"simplify(seconds={seconds}) must be at least 0; try 10.")
    cheap = rewrite(expression)
    if seconds == 0:
        return cheap
    sympy_module("simplify(seconds)")
    found = _in_another_process(cheap, seconds)
    if found is None:
        return cheap
    better = rewrite(found)
    return better if better.complexity < cheap.complexity and agree(cheap, better) else cheap


def _in_another_process(expression: Expression, seconds: float) -> Expression | None:
    try:
        done = subprocess.run(
            [sys.executable, "-c", WORKER, json.dumps(sys.path)],
            input=json.dumps(to_json(expression)),
            capture_output=True,
            text=True,
            timeout=seconds,
        )
    except (subprocess.TimeoutExpired, OSError):
        return None
    # SymPy fails on some expressions, and returns functions that are not ours for others.
    return from_json(json.loads(done.stdout)) if done.returncode == 0 else None


def agree(one: Expression, other: Expression, tolerance: float = 1e-9, seed: int = 0) -> bool:
    """Returns whether two expressions have the same values on samples of several sizes.

    Args:
        one: to compare.
        other: the same; a feature that only one of them uses counts too.
        tolerance: of the largest difference, in units of the root mean square of `one`.
        seed: of the 256 normal samples at each of the scales 1e-4, 1e-2, 1 and 100.
    """
    generator = np.random.default_rng(seed)
    variables = sorted({*one.variables, *other.variables})
    for scale in (1e-4, 1e-2, 1.0, 1e2):
        columns = {name: scale * generator.standard_normal(256) for name in variables}
        expected, found = values_of(one, columns), values_of(other, columns)
        size = np.sqrt(np.mean(np.square(expected)))
        if not np.all(np.abs(found - expected) <= tolerance * size):
            return False
    return True


def values_of(
    expression: Expression, columns: Mapping[Variable, np.ndarray]
) -> Float[np.ndarray, "..."]:
    """Returns the values of an expression in 64 bits; they may be infinite."""
    wide = {name: np.asarray(column, float) for name, column in columns.items()}
    with np.errstate(all="ignore"):
        value = evaluate(expression.root, np.asarray(expression.constants, float), wide)
    return np.asarray(value, float)


def rounded(
    expression: Expression,
    columns: Mapping[Variable, np.ndarray],
    output: np.ndarray,
    digits: int = 3,
    tolerance: float = 1e-4,
) -> Expression:
    """Returns an expression with constants rounded for display, but still explaining the output.

    Digits are significant ones, so that no constant becomes zero. They are raised for all constants
    until R2 on the rows has fallen by at most the tolerance.

    Args:
        expression: what to round.
        columns: the features of the rows, as `Table.mapping` returns them.
        output: what it is meant to explain, for each row.
        digits: the fewest significant digits, 1 to 17.
        tolerance: how far R2 may fall; at least 0. Where the output does not vary, how far the
            mean squared error may rise, in units of the mean square.

    Raises:
        ValueError: if the digits or the tolerance are out of range, or there are no rows.
        KeyError: if a feature is missing.

    Example:
        >>> from lopt.symbolic.expression import make_expression
        >>> g = Variable("gradient")
        >>> column = np.linspace(-1.0, 1.0, 9)
        >>> rule = make_expression(("multiply", 0.0012345, g))
        >>> rounded(rule, {g: column}, 0.0012345 * column).constants.tolist()
        [0.00123]
    """
    if not 1 <= digits <= 17:
        raise ValueError(f"rounded(digits={digits}) must be from 1 to 17; try 3.")
    if not tolerance >= 0:
        raise ValueError(f"rounded(tolerance={tolerance}) must be at least 0; try 1e-4.")
    if not np.size(output):
        raise ValueError("rounded(output) has no rows; rounding is checked on rows.")
    target = np.asarray(output, float)
    unit = float(np.var(target)) or float(np.mean(np.square(target))) or 1.0

    def error(candidate: Expression) -> float:
        with np.errstate(all="ignore"):
            return float(np.mean(np.square(values_of(candidate, columns) - target))) / unit

    limit = error(expression) + tolerance
    constants = np.asarray(expression.constants, float).tolist()
    for count in range(digits, 17):
        shorter = [float(significant(value, count)) for value in constants]
        candidate = Expression(expression.root, np.asarray(shorter, float))
        if error(candidate) <= limit:
            return candidate
    return expression
