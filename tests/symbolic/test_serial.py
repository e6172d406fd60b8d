"""Expressions survive files exactly, and files that are no expressions are refused by name."""

import copy
import json
import math

import jax
import numpy as np
import pytest
from random_trees import random_expression

from lopt.symbolic.expression import Call, Constant, Expression, Variable, make_expression
from lopt.symbolic.serial import MAX_DEPTH, from_json, to_json

G = Variable("gradient")
GOOD = to_json(make_expression(("multiply", 0.5, ("tanh", Variable("m", 2)))))


@pytest.mark.parametrize("seed", range(40))
def test_round_trip(seed):
    rule = random_expression(seed)
    back = from_json(json.loads(json.dumps(to_json(rule))))
    assert back.root == rule.root
    assert np.array_equal(back.constants, rule.constants)


def test_all_64_bits_survive_whatever_jax_is_set_to():
    numbers = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, math.pi, 1e-30]
    root = G
    for index in range(len(numbers)):
        root = Call("add", (root, Constant(index)))
    with jax.enable_x64(False):
        text = json.dumps(to_json(Expression(root, np.asarray(numbers))))
        constants = from_json(json.loads(text)).constants
    assert [x.hex() for x in constants.tolist()] == [x.hex() for x in numbers]


def test_shared_constants_stay_shared():
    root = Call("add", (Constant(0), Call("multiply", (Constant(0), G))))
    assert from_json(to_json(Expression(root, np.ones(1)))).root == root


def test_names_are_only_names():
    rule = make_expression(("negative", Variable("__import__('os').abort()")))
    assert from_json(json.loads(json.dumps(to_json(rule)))).root == rule.root


def _changed(path, value):
    data = copy.deepcopy(GOOD)
    part = data
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return data


ARGUMENTS = ("root", "arguments")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_changed(("version",), 2), "version is 2, not 1"),
        (_changed(("version",), True), "version is True"),
        (_changed(("version",), "1"), "version is '1'"),
        (_changed(("format",), "onnx"), "format is 'onnx'"),
        (_changed(("comment",), "x"), "it has 'comment'"),
        (_changed(("constants",), "0.5"), "constants is '0.5', not a list"),
        (_changed(("constants",), [math.nan]), r"constants\[0\] is nan, not a finite"),
        (_changed(("constants",), [math.inf]), r"constants\[0\] is inf"),
        (_changed(("constants",), [10**400]), r"constants\[0\] is a huge integer"),
        (_changed(("constants",), ["0.5"]), r"constants\[0\] is '0.5'"),
        (_changed(("constants",), [True]), r"constants\[0\] is True"),
        (_changed(("constants",), [None]), r"constants\[0\] is None"),
        (_changed(("constants",), []), r"root.arguments\[0\].constant is 0, not the place"),
        (_changed(("constants",), [1.0, 2.0]), r"constants\[1\] is 2.0, not used"),
        (_changed(("root",), "gradient"), "root is 'gradient', not an object"),
        (_changed(("root",), None), "root is None"),
        (_changed(("root", "operator"), "cosh"), "root.operator is 'cosh', not one of add"),
        (_changed(("root", "operator"), ["add"]), "root.operator is a list of 1"),
        (_changed(("root", "arguments"), []), "root.arguments is a list of 0, not a list of 2"),
        (_changed((*ARGUMENTS, 0), {}), r"root.arguments\[0\] lacks constant"),
        (_changed((*ARGUMENTS, 0), {"constant": -1}), "constant is -1"),
        (_changed((*ARGUMENTS, 0), {"constant": 0.0}), r"constant is 0.0"),
        (_changed((*ARGUMENTS, 1, "arguments", 0), {"feature": "m"}), "lacks lag"),
        (_changed((*ARGUMENTS, 1, "arguments", 0, "lag"), -1), "lag is -1"),
        (_changed((*ARGUMENTS, 1, "arguments", 0, "feature"), ""), "feature is ''"),
        ([], "it is a list of 0, not an object"),
        ({}, "it lacks constants, format, root, version"),
    ],
)
def test_bad_files_are_refused_by_name(data, message):
    with pytest.raises(ValueError, match=message):
        from_json(data)


def test_unknown_features_are_refused_by_name():
    assert from_json(GOOD, features=["m"]).variables == (Variable("m", 2),)
    with pytest.raises(ValueError, match=r"feature is 'm', not one of gradient, v"):
        from_json(GOOD, features=["v", "gradient"])


def test_absurd_depth_is_refused_both_ways():
    root = G
    for _ in range(MAX_DEPTH):
        root = Call("tanh", (root,))
    data = to_json(Expression(root, np.zeros(0)))
    assert from_json(data).root == root
    deep = {**data, "root": {"operator": "tanh", "arguments": [data["root"]]}}
    with pytest.raises(ValueError, match=f"more than {MAX_DEPTH} deep"):
        from_json(deep)
    with pytest.raises(ValueError, match=f"more than {MAX_DEPTH} deep"):
        to_json(Expression(Call("tanh", (root,)), np.zeros(0)))


def test_numbers_that_are_none_are_not_written():
    with pytest.raises(ValueError, match="constant 0 of the expression is nan"):
        to_json(make_expression(("multiply", math.nan, G)))
