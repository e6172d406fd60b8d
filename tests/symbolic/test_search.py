"""Fronts are fronts, terms keep values, Operon's trees are translated to the last bit."""

import sys

import numpy as np
import pytest

from lopt.symbolic.distill import distill, mirrored
from lopt.symbolic.expression import Variable, evaluate, make_expression
from lopt.symbolic.operators import OPERATORS
from lopt.symbolic.operon import NAMES, OperonSearch, translate
from lopt.symbolic.prune import prunings, shortened
from lopt.symbolic.sanity import tanh_table
from lopt.symbolic.search import (
    Candidate,
    Complexity,
    Front,
    judge,
    make_front,
    mean_squared_error,
    predict,
)
from lopt.symbolic.signs import is_odd
from lopt.symbolic.split import sample
from lopt.symbolic.table import Table
from lopt.symbolic.template import TemplateSearch
from lopt.symbolic.terms import Term, combine

G, M, V = Variable("gradient"), Variable("momentum"), Variable("second_moment")


def make_table(output, seed=0, runs=10, coordinates=4, steps=20, columns=(G, M, V)):
    rows = runs * coordinates * steps
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(rows, len(columns))) * (0.1, 1e-3, 1e-4)
    values[:, 2] = np.abs(values[:, 2]) + 1e-5
    run, rest = np.divmod(np.arange(rows), coordinates * steps)
    coordinate, step = np.divmod(rest, steps)
    zeros = np.zeros(rows, int)
    return Table(columns, values, output(*values.T), zeros, run, zeros, coordinate, step)


def candidate(complexity, train, **losses):
    return Candidate(make_expression(G), float(complexity), {"train": train, **losses})


def test_a_front_holds_what_is_better_than_all_that_is_shorter():
    some = [candidate(5, 0.5), candidate(3, 1.0), candidate(4, 1.0), candidate(5, 0.4)]
    front = make_front([*some, candidate(7, 0.4), candidate(9, np.inf), candidate(8, 0.1)])
    assert [(one.complexity, one.losses["train"]) for one in front.candidates] == [
        (3, 1.0),
        (5, 0.4),
        (8, 0.1),
    ]


def test_what_is_not_finite_on_any_split_is_not_on_the_front():
    front = make_front([candidate(1, 1.0), candidate(2, 0.5, validation=np.inf)])
    assert len(front) == 1


def test_no_front_without_candidates_or_out_of_order():
    with pytest.raises(ValueError, match="is empty"):
        make_front([candidate(1, np.inf)])
    with pytest.raises(ValueError, match="does not improve"):
        Front((candidate(1, 0.1), candidate(2, 0.2)))


def test_complexity_is_weighed():
    rule = make_expression(("add", 1.0, ("tanh", ("multiply", 2.0, G))))
    assert Complexity()(rule) == rule.complexity == 6
    assert Complexity({"tanh": 5.0, "constant": 0.5, "variable": 2.0})(rule) == 10.0
    # As the field counts: 1 + tanh(w g) is three operators and variables, and a constant.
    assert Complexity(weighted=True)(rule) == 4
    assert Complexity({"tanh": 5.0}, weighted=True)(rule) == 8.0
    with pytest.raises(ValueError, match="sine"):
        Complexity({"sine": 1.0})
    with pytest.raises(ValueError, match="finite"):
        Complexity({"tanh": -1.0})


def test_losses_are_mean_squared_errors():
    table = make_table(lambda g, m, v: 2 * g)
    (one,) = judge([make_expression(("multiply", 1.5, G))], {"train": table})
    np.testing.assert_allclose(one.losses["train"], np.mean((0.5 * table.values[:, 0]) ** 2))
    constant = make_expression(3.0)
    assert predict(constant, table).shape == (len(table),)
    np.testing.assert_allclose(
        mean_squared_error(constant, table), np.mean((3 - table.output) ** 2)
    )


@pytest.mark.parametrize("name", sorted(NAMES))
def test_combined_terms_have_the_values_of_their_parts(name):
    table = make_table(lambda g, m, v: g)
    arity = OPERATORS[name].arity
    bases = [Term(-0.7, G), combine("add", Term(2.0, M), Term(-3.0)), Term(1.5), Term(0.3, V)]
    sums = combine("divide", combine("add", Term(0.5, G), Term(1.0, M)), Term(0.2, V))
    for terms in np.ndindex(*(len(bases) + 1,) * arity):
        parts = [[*bases, sums][index] for index in terms]
        values = [predict(part.expression(), table) for part in parts]
        with np.errstate(all="ignore"):
            expected = OPERATORS[name].apply(np, *values)
        found = predict(combine(name, *parts).expression(), table)
        if name == "divide" and np.any(np.abs(values[1]) < 1e-30):
            continue
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)


def test_terms_have_no_constant_too_many():
    ratio = combine("divide", Term(3.0, M), combine("sqrt", Term(5.0, V)))
    assert combine("multiply", Term(0.1), ratio).expression().complexity == 6
    other_way = combine(
        "multiply", Term(2.0, M), combine("sqrt", combine("divide", Term(4.0), Term(1.0, V)))
    )
    assert other_way.expression().complexity == 6
    twice = combine("add", combine("add", Term(1.0, G), Term(2.0, M)), Term(3.0, G))
    assert twice.expression().complexity == 7
    assert combine("divide", Term(1.0, G), Term(0.0)).is_number


def test_prunings_leave_out_one_part():
    whole = make_expression(("add", ("multiply", 2.0, G), ("tanh", M)))
    table = make_table(lambda g, m, v: g)
    g, m = table.values[:, 0], table.values[:, 1]
    # One argument of the sum, one of the product, and the function around the last.
    expected = [2 * g, np.tanh(m), 2 + np.tanh(m), g + np.tanh(m), 2 * g + m]
    for one, values in zip(prunings(whole), expected, strict=True):
        np.testing.assert_allclose(predict(one, table), values)


def test_a_passenger_is_found_and_left_out():
    table = make_table(lambda g, m, v: 0.1 * np.tanh(3 * g))
    law = ("multiply", 0.2, ("tanh", ("multiply", 2.0, G)))
    front = shortened([make_expression(("add", law, ("multiply", 0.1, ("tanh", M))))], table)
    best = front.candidates[-1]
    assert best.complexity <= 6
    assert best.losses["train"] < 1e-12 * np.var(table.output)


def test_mirror_images_negate_what_is_odd():
    table = make_table(lambda g, m, v: g / np.sqrt(v))
    both = mirrored(table, ["gradient", "momentum"])
    half = len(table)
    assert len(both) == 2 * half
    np.testing.assert_array_equal(both.values[half:], table.values * (-1, -1, 1))
    np.testing.assert_array_equal(both.output[half:], -table.output)
    np.testing.assert_array_equal(both.run[half:], table.run)


def operon(**options):
    return OperonSearch(population=100, generations=10, tuned_generations=4, restarts=1, **options)


def test_operon_is_deterministic_and_depends_on_the_seed():
    table = make_table(lambda g, m, v: g * m / np.sqrt(v))
    once, again, other = (operon().search(table, seed) for seed in (1, 1, 2))
    assert [one.root for one in once] == [one.root for one in again]
    for one, two in zip(once, again, strict=True):
        np.testing.assert_array_equal(one.constants, two.constants)
    assert [one.root for one in once] != [one.root for one in other]


def added_to_counts(node, constants, columns):
    """Whether the 1e-8 that lopt's logarithm adds, and Operon's does not, counts in a row."""
    found = False
    for argument in getattr(node, "arguments", ()):
        found = found | added_to_counts(argument, constants, columns)
        if node.operator == "log":
            found = found | (np.abs(evaluate(argument, constants, columns)) < 1e-4)
    return found


def test_trees_of_operon_mean_the_same_here():
    """All operators, in the order of their arguments, with every constant."""
    import pyoperon
    from pyoperon.sklearn import SymbolicRegressor

    table = make_table(lambda g, m, v: g * m / np.sqrt(v) + np.abs(g))
    inputs = np.asfortranarray(table.values / table.scale)
    symbols = [symbol for symbol, _ in NAMES.values()]
    regressor = SymbolicRegressor(
        allowed_symbols=",".join((*symbols, "constant", "variable")),
        objectives=["r2", "length"],
        population_size=300,
        generations=2,
        max_evaluations=10**9,
        random_state=0,
    ).fit(inputs, table.output)
    columns = dict(zip(regressor.variables_, range(3), strict=True))
    used, compared = set(), 0
    for individual in regressor.individuals_:
        tree = individual.Genotype
        theirs = regressor.evaluate_model(tree, inputs)
        ours = translate(tree, columns, table).expression()
        if ours is None or not np.isfinite(theirs).all() or np.abs(theirs).max() > 1e4:
            continue
        # Theirs are of 32 bits.
        size = np.sqrt(np.mean(theirs**2.0)) + 1e-3
        good = np.abs(predict(ours, table) - theirs) < 1e-3 * (size + np.abs(theirs))
        good = good | added_to_counts(ours.root, ours.constants, table.mapping())
        assert good.mean() > 0.99, pyoperon.InfixFormatter.Format(tree, regressor.variables_, 6)
        used |= {node.Name for node in tree.Nodes}
        compared += 1
    assert compared > 100
    assert used >= {node for _, node in NAMES.values()}


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"asinh.*Operon has add"):
        OperonSearch(operators=("add", "asinh"))
    with pytest.raises(ValueError, match=r"OperonSearch\(population=3\)"):
        OperonSearch(population=3)


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyoperon.sklearn", None)
    with pytest.raises(ImportError, match=r"lopt\[symbolic\]"):
        operon().search(make_table(lambda g, m, v: g), 0)


def test_distillation_finds_a_law_and_reports_each_side():
    table = make_table(lambda g, m, v: -1e-3 * m / np.sqrt(v))
    stages = []
    found = distill(
        table,
        (OperonSearch(population=300, generations=20, tuned_generations=0, restarts=1),),
        (0, 1),
        progress=lambda *stage: stages.append(stage),
    )
    assert found.r_squared["test"] > 0.999999
    assert found.chosen.complexity <= 8
    assert set(found.r_squared) == set(found.chosen.losses) == {"train", "validation", "test"}
    assert found.chosen in found.front.candidates
    assert [done for done, _, _ in stages] == [0, 1, 2, 3, 4]
    assert {total for _, total, _ in stages} == {4}


@pytest.mark.slow
def test_the_longest_that_may_be_chosen_leaves_the_front_as_it_is():
    table = sample(tanh_table(0), 400, 0)
    search = TemplateSearch(("linear", "tanh"), max_terms=3)
    free, short = (distill(table, (search,), (0,), longest=most) for most in (None, 6))
    assert free.chosen.complexity > 6 >= short.chosen.complexity > 1
    assert [one.complexity for one in free.front.candidates] == [
        one.complexity for one in short.front.candidates
    ]
    with pytest.raises(ValueError, match=r"longest=0.*shortest"):
        distill(table, (search,), (0,), longest=0)


def test_rows_are_split_as_ones_own_labels_say():
    table = make_table(lambda g, m, v: g)
    labels = np.asarray(["train", "validation", "test"])[table.run % 3]
    found = distill(table, (TemplateSearch(("linear",)),), (0,), split=labels.tolist())
    for name, side in found.splits.mapping().items():
        np.testing.assert_array_equal(side.output, table.output[labels == name])
    assert found.chosen.expression.variables == (G,)


def test_odd_symmetry_is_imposed():
    # The even part is what a fit without symmetry would take along.
    table = make_table(lambda g, m, v: g + g**2)
    odd, even = ("gradient", "momentum"), ("second_moment",)
    free = distill(table, (operon(),), (0,))
    assert not is_odd(free.chosen.expression, odd, even)
    found = distill(table, (operon(),), (0,), odd=odd)
    assert all(is_odd(one.expression, odd, even) for one in found.front.candidates)
    assert found.r_squared["test"] > 0.9


def test_distill_refuses_what_it_cannot_do():
    table = make_table(lambda g, m, v: g)
    with pytest.raises(ValueError, match=r"searches and of seeds"):
        distill(table, (operon(),), ())
    with pytest.raises(ValueError, match=r"odd\) names velocity; the table has gradient"):
        distill(table, (operon(),), odd=("velocity",))
    with pytest.raises(ValueError, match="nothing to explain"):
        distill(make_table(lambda g, m, v: 0 * g + 2.0), (operon(),))
