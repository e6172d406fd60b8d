"""Known forms are found again, as front, odd where asked, and least squares are exact."""

import numpy as np
import pytest

from lopt.symbolic.expression import Call, Constant, Expression, Variable, walk
from lopt.symbolic.least_squares import forward_selection, gauss_newton, linear_fit
from lopt.symbolic.sanity import adam_table, lag_table, tanh_table
from lopt.symbolic.search import Front, judge, make_front, predict
from lopt.symbolic.select import r_squared
from lopt.symbolic.signs import is_odd
from lopt.symbolic.split import sample
from lopt.symbolic.table import Table
from lopt.symbolic.template import FORMS, TemplateSearch
from lopt.symbolic.template_units import TanhSumForm

F, G = Variable("f"), Variable("g")


def table_of(columns: dict[Variable, np.ndarray], output: np.ndarray) -> Table:
    ids = np.zeros(len(output), int)
    return Table(
        tuple(columns), np.column_stack(list(columns.values())), output, ids, ids, ids, ids, ids
    )


def noise(rows: int, *columns: Variable, seed: int = 0) -> dict[Variable, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {one: generator.normal(size=rows) for one in columns}


def front_of(search: TemplateSearch, table: Table) -> Front:
    return make_front(judge(search.search(table, 0), {"train": table}))


def shortest(front: Front, table: Table, least: float) -> Expression:
    return next(
        one.expression for one in front.candidates if r_squared(one.expression, table) >= least
    )


def constants(expression: Expression) -> list[float]:
    return sorted(np.asarray(expression.constants).tolist())


def test_linear_front_over_the_number_of_terms():
    lags = tuple(Variable("g", lag) for lag in range(5))
    x = noise(400, *lags)
    weights = [3.0, -2.0, 0.0, 0.0, 0.5]
    table = table_of(x, 1e-4 * sum(w * x[one] for w, one in zip(weights, lags, strict=True)))
    front = front_of(TemplateSearch(("linear",)), table)
    exact = shortest(front, table, 1 - 1e-12)
    assert exact.variables == (lags[0], lags[1], lags[4])
    assert np.allclose(constants(exact), [-2e-4, 0.5e-4, 3e-4])
    assert front.candidates[1].expression.variables == (lags[0],)


def test_an_intercept_only_where_odd_is_not_asked():
    x = noise(300, F)
    table = table_of(x, 2 * x[F] + 0.7)
    free = shortest(front_of(TemplateSearch(("linear",)), table), table, 1 - 1e-12)
    assert np.allclose(constants(free), [0.7, 2.0])
    for one in TemplateSearch(odd=True).search(table, 0):
        assert is_odd(one, odd=["f"])


@pytest.mark.slow
def test_odd_search_divides_only_by_what_is_never_negative():
    table = sample(adam_table(0), 1000, 0)
    even = ["second_moment_0.999"]
    odd = [one.name for one in table.columns if one.name not in even]
    found = TemplateSearch(odd=True).search(table, 0)
    assert any(even[0] in {one.name for one in form.variables} for form in found)
    assert all(is_odd(form, odd=odd, even=even) for form in found)


def test_signed_powers_with_a_free_exponent():
    x = noise(500, F, G)
    output = 0.3 * np.sign(x[F]) * np.abs(x[F]) ** 1.4 - 2.0 * np.sign(x[G]) * np.abs(x[G]) ** 0.6
    table = table_of(x, output)
    front = front_of(TemplateSearch(("power",), odd=True, max_terms=2), table)
    found = shortest(front, table, 1 - 1e-9)
    assert np.allclose(constants(found), [-2.0, 0.3, 0.6, 1.4], atol=1e-4)


def test_even_terms_where_allowed():
    x = noise(500, F, G)
    table = table_of(x, 0.5 * x[F] ** 2 - 3 * np.abs(x[G]))
    found = shortest(front_of(TemplateSearch(("power",), max_terms=3), table), table, 1 - 1e-9)
    assert found.complexity == 9


def test_tanh_of_a_linear_form_is_recovered():
    # The 0.1 tanh(-1.3 m_t - 0.45 g_t + 0.6 m_{t-1}), to three digits.
    table = sample(tanh_table(0), 1500, 0)
    front = front_of(TemplateSearch(("linear", "tanh"), odd=True), table)
    found = shortest(front, table, 1 - 1e-9)
    assert found.complexity <= 16
    assert r_squared(found, tanh_table(1)) > 1 - 1e-9
    sign = np.sign(np.asarray(found.constants)[0])
    wanted = np.sort([0.1, *(sign * np.asarray([-1.3, -0.45, 0.6]))])
    assert np.allclose(np.sort(np.append(sign * found.constants[0], found.constants[1:])), wanted)


def test_the_published_sum_of_clipped_terms_shares_its_gamma():
    x = noise(800, F, Variable("f", 1), G)
    output = 0.5 * 1.5 * np.tanh(x[F] / 1.5) - 0.2 * 1.5 * np.tanh(x[Variable("f", 1)] / 1.5)
    output += 0.4 * 0.3 * np.tanh(x[G] / 0.3)
    table = table_of(x, output)
    found = shortest(front_of(TemplateSearch(("clipped",)), table), table, 1 - 1e-9)
    # Weights times gamma, then gamma of f and of g: five constants, seven places.
    assert np.allclose(constants(found), sorted([0.75, -0.3, 0.12, 1.5, 0.3]), atol=1e-4)
    assert sum(isinstance(node, Constant) for node in walk(found.root)) == 6


@pytest.mark.parametrize("seed", range(5))
def test_adam_is_recovered_from_averages(seed):
    table = sample(adam_table(seed), 1500, seed)
    found = shortest(front_of(TemplateSearch(("ratio",)), table), table, 0.9999)
    assert found.complexity <= 16
    assert {str(one) for one in found.variables} == {"momentum_0.9", "second_moment_0.999"}
    assert r_squared(found, adam_table(seed + 10)) > 0.9999


def test_adam_from_raw_lags_is_explained_beyond_the_figure():
    table, unseen = sample(lag_table("adam", 0), 1500, 0), lag_table("adam", 1)
    found = front_of(TemplateSearch(("linear", "memory")), table).candidates[-1].expression
    assert r_squared(found, unseen) > 0.93
    assert len(found.constants) <= 4


def test_momentum_from_raw_lags_is_one_decay():
    table = sample(lag_table("momentum 0.6", 0), 1000, 0)
    (found,) = (
        one for one in TemplateSearch(("memory",)).search(table, 0)
        if len(one.constants) == 2 and len(one.variables) == 20
    )  # fmt: skip
    assert r_squared(found, table) > 1 - 1e-6
    assert np.allclose(found.constants[1], 0.6, atol=1e-3)


def test_every_form_alone_proposes_what_it_says():
    table = sample(tanh_table(0), 300, 0)
    # What only this form has, among operators.
    signs = {"power": "pow", "tanh": "tanh", "clipped": "tanh", "ratio": "sqrt", "memory": "add"}
    for form in FORMS:
        found = TemplateSearch((form,), max_terms=3).search(table, 0)
        used = {node.operator for one in found for node in walk(one.root) if isinstance(node, Call)}
        assert signs.get(form, "multiply") in used
        for one in found:
            assert np.isfinite(predict(one, table)).all()


def test_constant_and_hopeless_tables_do_not_break_it():
    x = noise(50, F)
    for output in (np.zeros(50), np.full(50, 3.0)):
        found = TemplateSearch().search(table_of(x, output), 0)
        best = min(np.mean((predict(one, table_of(x, output)) - output) ** 2) for one in found)
        assert best < 1e-20
    nothing = table_of({F: np.zeros(50)}, x[F])
    assert all(
        np.isfinite(predict(one, nothing)).all() for one in TemplateSearch().search(nothing, 0)
    )


def test_equal_tables_give_equal_expressions():
    table = sample(tanh_table(0), 200, 0)
    one, other = (TemplateSearch(max_terms=3).search(table, seed) for seed in (0, 1))
    assert [a.root for a in one] == [b.root for b in other]
    assert all(np.array_equal(a.constants, b.constants) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("wrong", [{"forms": ("cosine",)}, {"forms": ()}, {"max_terms": 0}])
def test_wrong_options_are_named(wrong):
    with pytest.raises(ValueError, match=rf"TemplateSearch\({next(iter(wrong))}"):
        TemplateSearch(**wrong)


def test_forward_selection_is_the_best_next_term():
    # Against plain least squares with each candidate in turn.
    generator = np.random.default_rng(0)
    columns, output = generator.normal(size=(60, 6)), generator.normal(size=60)
    chosen = forward_selection(columns, output, 4)
    for count in range(1, 5):
        errors = []
        for extra in range(6):
            part = columns[:, [*chosen[: count - 1], extra]]
            errors.append(np.sum((part @ linear_fit(part, output) - output) ** 2))
        assert int(np.argmin(errors)) == chosen[count - 1]


def test_forward_selection_leaves_out_combinations():
    x = np.random.default_rng(0).normal(size=(30, 2))
    assert len(forward_selection(np.column_stack([x, x @ [1.0, 2.0]]), x @ [1.0, 1.0], 3)) <= 2


def test_gauss_newton_finds_a_minimum_within_bounds():
    t = np.linspace(0, 3, 40)

    def model(numbers):
        decay = np.exp(-numbers[1] * t)
        return numbers[0] * decay, np.column_stack([decay, -numbers[0] * t * decay])

    free = np.arange(2)
    for upper, wanted in (([9.0, 9.0], [2.0, 0.7]), ([9.0, 0.5], None)):
        numbers, loss = gauss_newton(
            model,
            np.asarray([1.0, 0.1]),
            2 * np.exp(-0.7 * t),
            free,
            np.zeros(2),
            np.asarray(upper),
        )
        if wanted is None:
            assert numbers[1] == 0.5
            assert loss > 1e-4
        else:
            assert np.allclose(numbers, wanted)
            assert loss < 1e-20


def test_sums_of_several_tanh_are_recovered_with_no_weight_too_many():
    x = noise(1500, F, G, Variable("f", 1), Variable("g", 1))
    one = 0.7 * np.tanh(2.0 * x[F] - 1.0 * x[G])
    output = 1e-3 * (one - 0.4 * np.tanh(1.5 * x[Variable("g", 1)] + 0.8 * x[F]))
    table = table_of(x, output)
    odd = shortest(front_of(TemplateSearch(("tanh_sum",), odd=True), table), table, 1 - 1e-9)
    assert np.allclose(np.sort(np.abs(odd.constants)), [4e-4, 7e-4, 0.8, 1.0, 1.5, 2.0], rtol=1e-3)
    assert is_odd(odd, odd=["f", "g"])
    shifted = table_of(x, output + 1e-3 * np.tanh(x[F] + 0.5))
    free = shortest(front_of(TemplateSearch(("tanh_sum",)), shifted), shifted, 1 - 1e-8)
    assert any(np.isclose(abs(c), 0.5, rtol=1e-2) for c in constants(free))
    assert len(free.constants) == 9


def test_slopes_of_a_sum_of_tanh_are_finite_differences():
    generator = np.random.default_rng(0)
    columns = generator.normal(size=(5, 2))
    form = TanhSumForm((F, G), columns, np.ones(2), units=3, odd=False)
    numbers = generator.normal(size=2 * 3 + 3 * 2)
    values, slopes = form.values(numbers)
    for i in range(len(numbers)):
        step = 1e-6 * np.eye(len(numbers))[i]
        around = [form.values(numbers + sign * step)[0] for sign in (1, -1)]
        np.testing.assert_allclose(slopes[:, i], (around[0] - around[1]) / 2e-6, atol=1e-8)
    expression = form.expression(numbers, list(range(len(numbers))))
    table = table_of({F: columns[:, 0], G: columns[:, 1]}, values)
    np.testing.assert_allclose(predict(expression, table), values, rtol=1e-12)


def test_more_tanh_are_tried_only_while_they_help():
    x = noise(400, F)
    table = table_of(x, np.tanh(2 * x[F]) + 0.5 * np.tanh(x[F] - 1))
    found = TemplateSearch(("tanh_sum",)).search(table, 0)
    heights = [
        sum(isinstance(node, Call) and node.operator == "tanh" for node in walk(one.root))
        for one in found
    ]
    assert max(heights) == 2
