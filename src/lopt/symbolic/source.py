"""Expressions as source code that needs no lopt: a NumPy or a PyTorch function.

A module with the guards that the expression uses, and a function `update` with one argument for
each feature. Features come from files, so their names only ever appear as identifiers that are
made here, and escaped in comments.
"""

import dataclasses
import keyword
import math
import re
from collections.abc import Mapping

import numpy as np

from lopt.symbolic.expression import Call, Expression, Node, Variable, evaluate, walk

# What operators are in both languages; @ stands for the module. Guards as in operators.py.
CALLS: Mapping[str, str] = {
    "add": "({} + {})",
    "subtract": "({} - {})",
    "multiply": "({} * {})",
    "negative": "(-{})",
    "divide": "divide({}, {})",
    "pow": "signed_power({}, {})",
    "max": "@.maximum({}, {})",
    "min": "@.minimum({}, {})",
    "greater": "greater({}, {})",
    "quotient": "({} / @.sqrt(1 + @.clip({}, -1e10, 1e10) ** 2))",
    "abs": "@.abs({})",
    "sign": "@.sign({})",
    "square": "@.clip({}, -1e10, 1e10) ** 2",
    "cube": "@.clip({}, -1e10, 1e10) ** 3",
    "sqrt": "root({})",
    "log": "@.log(@.abs({}) + 1e-8)",
    "exp": "@.exp(@.clip({}, -69.0, 69.0))",
    "tanh": "@.tanh({})",
    "sinh": "@.sinh(@.clip({}, -69.0, 69.0))",
    "asinh": "@.arcsinh({})",
    "relu": "relu({})",
    "erfc": "erfc({})",
}
# Arguments of these, Python's operators, may be Python's numbers, which take the precision of the
# arrays that they meet.
PLAIN = frozenset({"add", "subtract", "multiply", "negative"})
HELPERS: Mapping[str, str] = {
    "divide": '''
def divide(x, y):
    """x / y within 1e18; zero where |y| is at most 1e-18."""
    small, large = @.abs(y) <= 1e-18, @.abs(x) * 1e-18 >= @.abs(y)
    plain = ~(small | large)
    quotient = @.where(plain, x, @.ones_like(x)) / @.where(plain, y, @.ones_like(y))
    limit = @.sign(x) * @.sign(y) / 1e-18
    return @.where(plain, quotient, @.where(small, @.zeros_like(limit), limit))
''',
    "pow": '''
def signed_power(x, y):
    """sign(x) |x|^y within e^69; zero where its derivative is above e^82."""
    safe, y = @.abs(x) > 1e-30, @.clip(y, -1e10, 1e10)
    logs = @.log(@.abs(@.where(safe, x, @.ones_like(x))))
    exponents = y * logs
    plain = safe & (@.abs(exponents) < 69.0) & (exponents - logs < 82.0)
    logs = @.log(@.abs(@.where(plain, x, @.ones_like(exponents))))
    powers = @.exp(@.where(plain, y, @.zeros_like(exponents)) * logs)
    grows = safe & (exponents >= 69.0) & (@.abs(x) > 1)
    limit = @.where(grows, @.full_like(exponents, math.exp(69.0)), @.zeros_like(exponents))
    return @.sign(x) * @.where(plain, powers, limit)
''',
    "sqrt": '''
def root(x):
    """The square root of |x|; zero where that is at most 1e-30."""
    safe = @.abs(x) > 1e-30
    roots = @.sqrt(@.abs(@.where(safe, x, @.ones_like(x))))
    return @.where(safe, roots, @.zeros_like(roots))
''',
    "greater": '''
def greater(x, y):
    """One where x > y, else zero."""
    shaped = @.clip(x, -1, 1) + @.clip(y, -1, 1)
    return @.where(x > y, @.ones_like(shaped), @.zeros_like(shaped))
''',
    "relu": '''
def relu(x):
    """The larger of x and zero."""
    return @.maximum(x, @.zeros_like(x))
''',
}


@dataclasses.dataclass(frozen=True)
class _Language:
    """What differs: the module, its imports, its error function, how a number becomes an array."""

    module: str
    imports: str
    erfc: str
    constant: str


NUMPY = _Language(
    "np", "import numpy as np", "from scipy.special import erfc", "np.asarray({}, dtype={}.dtype)"
)
TORCH = _Language(
    "torch",
    "import torch",
    "from torch.special import erfc",
    "torch.as_tensor({}, dtype={}.dtype, device={}.device)",
)


def to_numpy_source(expression: Expression, name: str = "update") -> str:
    """Returns a Python module with the expression as a NumPy function.

    It gives what `Expression` gives: the same operators with the same guards, at the precision of
    its arguments. It imports SciPy only for `erfc`.

    Args:
        expression: of any features.
        name: of the function.

    Returns:
        The source. The function takes one array for each feature, in the order of
        `expression.variables`; a comment says which feature is which argument.

    Raises:
        ValueError: if the name is no identifier, or an expression has no feature.

    Example:
        >>> from lopt.symbolic.expression import make_expression
        >>> rule = make_expression(("multiply", -0.1, ("tanh", Variable("momentum_0.9", 1))))
        >>> print(to_numpy_source(rule).split("import numpy as np")[1].strip())
        def update(momentum_0_9_lag_1):
            # momentum_0_9_lag_1: the feature 'momentum_0.9', 1 step ago
            return (-0.1 * np.tanh(momentum_0_9_lag_1))
    """
    return _source(expression, name, NUMPY)


def to_torch_source(expression: Expression, name: str = "update") -> str:
    """Returns a Python module with the expression as a PyTorch function, which autograd can pass.

    See `to_numpy_source`. Arguments are tensors; constants take their type and device.
    """
    return _source(expression, name, TORCH)


def identifiers(variables: tuple[Variable, ...], taken: frozenset[str]) -> dict[Variable, str]:
    """Returns a different Python identifier for each variable, whatever they are called."""
    names: dict[Variable, str] = {}
    for variable in variables:
        stem = re.sub(r"[^0-9a-zA-Z]+", "_", variable.name).strip("_") or "feature"
        stem = f"feature_{stem}" if stem[0].isdigit() else stem
        stem = f"{stem}_lag_{variable.lag}" if variable.lag else stem
        name, count = stem, 1
        while name in taken or name in names.values() or keyword.iskeyword(name):
            count += 1
            name = f"{stem}_{count}"
        names[variable] = name
    return names


def _source(expression: Expression, name: str, language: _Language) -> str:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(
            f"The name {name!r} of the function is no Python identifier; try 'update'."
        )
    if not expression.variables:
        raise ValueError("The expression has no feature; a constant needs no function.")
    helpers = {text.split("(")[0] for text in CALLS.values()} | {"math", "torch", "np", "constant"}
    if name in helpers:
        raise ValueError(f"The name {name!r} is that of a helper of the source; try 'update'.")
    # `constant` has an argument `value`, and numbers that are not finite are written with `float`.
    names = identifiers(expression.variables, frozenset({*helpers, name, "value", "float"}))
    used = {node.operator for node in walk(expression.root) if isinstance(node, Call)}
    constants = np.asarray(expression.constants, float).tolist()
    text, _ = _render(expression.root, constants, names)
    head = [
        '"""An equation that lopt distilled from a learned optimizer."""',
        "",
        *(["import math", ""] if "pow" in used else []),
        language.imports,
        *([language.erfc] if "erfc" in used else []),
        "",
    ]
    parts = [helper.rstrip("\n") for key, helper in HELPERS.items() if key in used]
    body = [f"    # {names[variable]}: {_described(variable)}" for variable in names]
    if "constant(" in text:
        like = next(iter(names.values()))
        made = language.constant.replace("{}", "value", 1).replace("{}", like)
        body += ["", "    def constant(value):", f"        return {made}", ""]
    body += [f"    return {text}", ""]
    definition = "\n".join([f"\ndef {name}({', '.join(names.values())}):", *body])
    return "\n".join([*head, *(f"{part}\n" for part in parts), definition]).replace(
        "@.", f"{language.module}."
    )


def _described(variable: Variable) -> str:
    when = {0: "", 1: ", 1 step ago"}.get(variable.lag, f", {variable.lag} steps ago")
    return f"the feature {ascii(variable.name).replace('@', 'x40')}{when}"


def _render(node: Node, constants: list[float], names: Mapping[Variable, str]) -> tuple[str, bool]:
    """Returns the text of a tree, and whether it is a number rather than an array."""
    if isinstance(node, Variable):
        return names[node], False
    if all(not isinstance(part, Variable) for part in walk(node)):
        with np.errstate(all="ignore"):
            value = float(evaluate(node, constants, {}))
        return (repr(value) if math.isfinite(value) else f"float('{value}')"), True
    assert isinstance(node, Call)
    arguments = [_render(argument, constants, names) for argument in node.arguments]
    texts = [
        f"constant({text})" if number and node.operator not in PLAIN else text
        for text, number in arguments
    ]
    return CALLS[node.operator].format(*texts), False
