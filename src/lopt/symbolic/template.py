"""Regression on forms that update rules are known to have: no evolution, only least squares.

Linear combinations of lags, signed powers, one tanh of a linear form or several (a network of one
hidden layer, pruned weight by weight), sums of clipped terms (the final rule of Zheng et al. 2022,
arXiv:2203.06578), momentum over the root of a second moment (Adam, Kingma and Ba 2015,
arXiv:1412.6980), and both from exponential averages of raw lags.
"""

from collections.abc import Iterator

import equinox as eqx
import numpy as np

from lopt.core.checks import check_integer
from lopt.symbolic.expression import Expression, Variable, make_expression
from lopt.symbolic.least_squares import Matrix, Row, Weights
from lopt.symbolic.search import AbstractSearch, predict
from lopt.symbolic.stepwise import stepwise
from lopt.symbolic.table import Table
from lopt.symbolic.template_forms import AbstractForm, ClippedForm, RatioForm, TanhForm
from lopt.symbolic.template_memory import memories
from lopt.symbolic.template_sums import Inputs, linear_sums, power_sums
from lopt.symbolic.template_units import tanh_sums

FORMS = ("linear", "power", "tanh", "clipped", "ratio", "memory", "tanh_sum")
MEMORIES = (3, 5, 10)
_ROUNDING = 1e-11


class TemplateSearch(AbstractSearch):
    """Fits known forms, each with every number of terms: chosen forwards, then left out again.

    It needs no extra and takes seconds. It is deterministic: seeds change nothing.

    Attributes:
        forms: which to fit: "linear" sums of columns; "power", sums of signed powers
            `|x|^p sign(x)`; "tanh", `a tanh(w.x)`; "clipped", `sum w gamma tanh(x / gamma)`;
            "ratio", `w.x / sqrt(v.x^2)`; "memory", exponential averages of lags, alone or as such
            a ratio; "tanh_sum", `sum a tanh(b + w.x)` of two to eight tanh.
        odd: whether to allow odd functions only: no intercept, no even term. A column that is
            never negative, such as a second moment, is taken not to change its sign with the
            gradient, and may then only be divided by.
        max_terms: the most terms of one expression, but for "tanh_sum", whose tanh have as many.
    """

    forms: tuple[str, ...] = eqx.field(default=FORMS, static=True)
    odd: bool = eqx.field(default=False, static=True)
    max_terms: int = eqx.field(default=12, static=True)

    def __check_init__(self) -> None:
        if not self.forms or set(self.forms) - set(FORMS):
            raise ValueError(
                f"TemplateSearch(forms={self.forms!r}) must be some of {', '.join(FORMS)}."
            )
        check_integer("TemplateSearch", "max_terms", self.max_terms, 1, hint=12)

    def search(self, table: Table, seed: int) -> list[Expression]:
        """Fits all forms on all rows; see `AbstractSearch.search`."""
        from threadpoolctl import threadpool_limits

        # The matrices are so small that threads of a linear algebra library only wait, at full
        # load: five times the CPU seconds on two cores.
        with threadpool_limits(1):
            return self._search(table)

    def _search(self, table: Table) -> list[Expression]:
        output = np.asarray(table.output, float)
        values = np.asarray(table.values, float)
        scales = _scales(table.columns, values)
        columns = values / scales
        moments = np.flatnonzero(np.all(columns >= 0, axis=0))
        signed = np.setdiff1d(np.arange(len(scales)), moments if self.odd else [])
        found = [make_expression(0.0 if self.odd else float(np.mean(output)))]
        if not len(signed):
            return found
        names = tuple(table.columns[i] for i in signed)
        inputs = Inputs(names, columns[:, signed], scales[signed])
        # An intercept is nodes that seldom do anything: where it may be, each form without, too.
        for odd in (True,) if self.odd else (True, False):
            if "linear" in self.forms:
                found += linear_sums(inputs, output, not odd, self.max_terms)
            if "power" in self.forms:
                found += power_sums(inputs, output, odd, self.max_terms)
        for form in self._forms(inputs, RatioForm(table.columns, columns, scales, moments, signed)):
            found += stepwise(form, output, self.max_terms)
        if "memory" in self.forms:
            for memory in memories(names, values[:, signed], MEMORIES):
                found.append(memory.expression(memory.fit(output)[0]))
        # So many constants are for what no law explains.
        if "tanh_sum" in self.forms and not _explained(found, table, output):
            found += tanh_sums(inputs, output, self.odd)
        return found

    def _forms(self, inputs: Inputs, ratio: RatioForm) -> Iterator[AbstractForm]:
        parts = (inputs.names, inputs.columns, inputs.scales)
        if "tanh" in self.forms:
            yield TanhForm(*parts, odd=True)
            if not self.odd:
                yield TanhForm(*parts, odd=False)
        if "clipped" in self.forms:
            yield ClippedForm(*parts)
        if "ratio" in self.forms:
            yield ratio


def _explained(found: list[Expression], table: Table, output: Row) -> bool:
    """Returns whether a proposal leaves no more than rounding of single precision."""
    errors = (np.mean((predict(one, table) - output) ** 2) for one in found)
    return any(error <= _ROUNDING * np.mean(output**2) for error in errors)


def _scales(names: tuple[Variable, ...], values: Matrix) -> Weights:
    """Returns the root mean square of each feature over all its lags, one if it is zero."""
    squares = np.mean(values**2, axis=0)
    of_name = {
        name: np.sqrt(np.mean([squares[i] for i, one in enumerate(names) if one.name == name]))
        for name in {one.name for one in names}
    }
    return np.asarray([of_name[one.name] if of_name[one.name] > 0 else 1.0 for one in names])
