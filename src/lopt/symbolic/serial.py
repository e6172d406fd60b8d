"""Expressions as plain data for JSON files, and back; nothing in a file is ever evaluated.

A constant is written once, however often the tree uses it, as a decimal number that reads back as
the same 64 bits: `{"format": "lopt.expression", "version": 1, "constants": [-0.5], "root":
{"operator": "multiply", "arguments": [{"constant": 0}, {"feature": "gradient", "lag": 0}]}}`.
"""

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from lopt.symbolic.expression import Call, Constant, Expression, Node, Variable, walk
from lopt.symbolic.operators import OPERATORS

FORMAT, VERSION = "lopt.expression", 1
# Far beyond what a search finds or a reader can follow, and below Python's limit on recursion.
MAX_DEPTH = 200


def to_json(expression: Expression) -> dict[str, Any]:
    """Returns an expression as dictionaries, lists, strings and numbers.

    Raises:
        ValueError: if a constant is not finite, or the tree is deeper than `from_json` reads.

    Example:
        >>> from lopt.symbolic.expression import make_expression
        >>> data = to_json(make_expression(("negative", Variable("gradient", 2))))
        >>> data["root"]
        {'operator': 'negative', 'arguments': [{'feature': 'gradient', 'lag': 2}]}
        >>> from_json(data).root == make_expression(("negative", Variable("gradient", 2))).root
        True
    """
    constants = np.asarray(expression.constants, float).tolist()
    for index, value in enumerate(constants):
        if not math.isfinite(value):
            raise ValueError(
                f"The constant {index} of the expression is {value}; only finite ones are written."
            )
    return {
        "format": FORMAT,
        "version": VERSION,
        "constants": constants,
        "root": _node_to_json(expression.root, 0),
    }


def from_json(data: Any, features: Collection[str] | None = None) -> Expression:
    """Returns the expression that `to_json` wrote.

    Args:
        data: as `json.loads` returns it. May come from anywhere: all of it is checked.
        features: names that variables may have; by default any.

    Returns:
        The expression, its constants in 64 bits.

    Raises:
        ValueError: naming what is wrong with the data, and where.
    """
    _check_keys("it", data, {"format", "version", "constants", "root"})
    if data["format"] != FORMAT:
        raise _wrong("format", data["format"], f"{FORMAT!r}")
    version = data["version"]
    if isinstance(version, bool) or version != VERSION:
        raise _wrong("version", version, f"{VERSION}, which this lopt reads")
    if not isinstance(data["constants"], list):
        raise _wrong("constants", data["constants"], "a list of numbers")
    constants = [
        _number(f"constants[{index}]", value) for index, value in enumerate(data["constants"])
    ]
    root = _read("root", data["root"], 0, len(constants), features)
    unused = set(range(len(constants))) - {
        node.index for node in walk(root) if isinstance(node, Constant)
    }
    if unused:
        raise _wrong(f"constants[{min(unused)}]", constants[min(unused)], "used by the tree")
    return Expression(root, np.asarray(constants, float))


def _node_to_json(node: Node, depth: int) -> dict[str, Any]:
    _check_depth("root", depth)
    if isinstance(node, Constant):
        return {"constant": node.index}
    if isinstance(node, Variable):
        return {"feature": node.name, "lag": node.lag}
    arguments = []
    for argument in node.arguments:
        arguments.append(_node_to_json(argument, depth + 1))
    return {"operator": node.operator, "arguments": arguments}


def _read(place: str, data: Any, depth: int, constants: int, features: Any) -> Node:
    _check_depth(place, depth)
    if isinstance(data, dict) and "operator" in data:
        _check_keys(place, data, {"operator", "arguments"})
        operator, arguments = data["operator"], data["arguments"]
        if not isinstance(operator, str) or operator not in OPERATORS:
            raise _wrong(f"{place}.operator", operator, f"one of {', '.join(OPERATORS)}")
        arity = OPERATORS[operator].arity
        if not isinstance(arguments, list) or len(arguments) != arity:
            raise _wrong(f"{place}.arguments", arguments, f"a list of {arity}, as {operator} takes")
        parts = []
        for index, argument in enumerate(arguments):
            at = f"{place}.arguments[{index}]"
            parts.append(_read(at, argument, depth + 1, constants, features))
        return Call(operator, tuple(parts))
    if isinstance(data, dict) and "feature" in data:
        _check_keys(place, data, {"feature", "lag"})
        name, lag = data["feature"], data["lag"]
        if not isinstance(name, str) or not name:
            raise _wrong(f"{place}.feature", name, "a name")
        if features is not None and name not in features:
            raise _wrong(f"{place}.feature", name, f"one of {', '.join(sorted(features))}")
        if not _is_count(lag):
            raise _wrong(f"{place}.lag", lag, "a number of steps, 0 for the present")
        return Variable(name, lag)
    _check_keys(place, data, {"constant"})
    index = data["constant"]
    if not _is_count(index) or index >= constants:
        raise _wrong(f"{place}.constant", index, f"the place of one of {constants} constants")
    return Constant(index)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1_000_000


def _number(place: str, value: Any) -> float:
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _wrong(place, value, "a finite number")
    return number


def _check_keys(place: str, data: Any, keys: set[str]) -> None:
    if not isinstance(data, dict):
        raise _wrong(place, data, f"an object with {', '.join(sorted(keys))}")
    if missing := sorted(keys - set(data)):
        raise ValueError(f"The expression file is not valid: {place} lacks {', '.join(missing)}.")
    if unknown := sorted(map(str, set(data) - keys)):
        raise ValueError(
            f"The expression file is not valid: {place} has {_short(unknown[0])}, which is not one "
            f"of {', '.join(sorted(keys))}."
        )


def _check_depth(place: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        shown = place if len(place) < 60 else place[:60] + "..."
        raise ValueError(
            f"The expression is nested more than {MAX_DEPTH} deep ({shown}); simplify it."
        )


def _short(value: Any) -> str:
    # Ends of long values say nothing, and printing deep ones fails.
    if isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge integer"
    return text if len(text) <= 60 else text[:60] + "..."


def _wrong(place: str, value: Any, wanted: str) -> ValueError:
    return ValueError(
        f"The expression file is not valid: {place} is {_short(value)}, not {wanted}."
    )
