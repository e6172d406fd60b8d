"""Known optimizers, as tables: does distillation find the rules that made them?

Zheng et al. 2022, arXiv:2203.06578, section 4.2: five optimizers from raw gradients of the last 20
steps. Two more are laws of exponential averages, Adam's and a network-like one, which are to be
found as equations. Gradients are autoregressive noise, as slow and as different in scale between
coordinates as those of a training run.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
from jaxtyping import Float

from lopt.symbolic.distill import Progress, distill
from lopt.symbolic.expression import Expression, Variable
from lopt.symbolic.operon import OperonSearch
from lopt.symbolic.search import AbstractSearch
from lopt.symbolic.table import Table
from lopt.symbolic.template import TemplateSearch

Gradients = Float[np.ndarray, "coordinate step"]
LAGS = 20


def linear_lags(grads: Gradients) -> Gradients:
    """Returns sum_{i<=10} (1 - 0.1 i) g_{t-i}."""
    return np.sum([(1 - 0.1 * lag) * _lag(grads, lag) for lag in range(11)], axis=0)


def nonlinear_mix(grads: Gradients) -> Gradients:
    """Returns g_t^2 + g_{t-1} + 2 g_{t-2} + exp(g_{t-4})."""
    return grads**2 + _lag(grads, 1) + 2 * _lag(grads, 2) + np.exp(_lag(grads, 4))


def momentum(grads: Gradients, decay: float = 0.6) -> Gradients:
    """Returns sum_i decay^i g_{t-i}, over the whole past."""
    return average(grads, decay) / (1 - decay)


def adam(grads: Gradients, decay: float = 0.9) -> Gradients:
    """Returns the exponential average over the root of that of the square, both over the past."""
    return average(grads, decay) / (np.sqrt(average(grads**2, decay)) + 1e-8)


LAG_RULES: Mapping[str, Callable[[Gradients], Gradients]] = MappingProxyType(
    {
        "sgd": lambda grads: -0.01 * grads,
        "linear lags": linear_lags,
        "nonlinear mix": nonlinear_mix,
        "momentum 0.6": momentum,
        "adam": adam,
    }
)


def lag_table(
    rule: str, seed: int = 0, runs: int = 20, coordinates: int = 10, steps: int = 40
) -> Table:
    """Returns a known optimizer's updates beside gradients of the last 20 steps.

    Args:
        rule: a key of `LAG_RULES`.
        seed: of the gradients; they have a standard deviation of about 0.1.
        runs: of the table.
        coordinates: of each run.
        steps: recorded of each coordinate, one after the other.

    Raises:
        ValueError: if there is no such rule.
    """
    if rule not in LAG_RULES:
        raise ValueError(f"lag_table(rule={rule!r}) is none of {', '.join(LAG_RULES)}.")
    # Averages have forgotten their beginning long before rows are recorded.
    grads = _noise(seed, runs * coordinates, 200 + steps, persistence=0.5)
    grads = 0.1 * grads
    features = {Variable("gradient", lag): _lag(grads, lag) for lag in range(LAGS)}
    return _table(features, LAG_RULES[rule](grads), runs, steps)


def adam_table(seed: int = 0, runs: int = 20, coordinates: int = 25, steps: int = 40) -> Table:
    """Returns Adam's updates -0.001 m / (sqrt(v) + 1e-8) beside exponential averages.

    Scales of coordinates are from 1e-4 to 1e-1. Columns are the gradient, m and v, two more
    momenta, and the parameter.
    """
    grads = _scaled_noise(seed, runs * coordinates, 600 + steps)
    m, v = average(grads, 0.9), average(grads**2, 0.999)
    features = {
        "gradient": grads,
        "momentum_0.9": m,
        "second_moment_0.999": v,
        "momentum_0.5": average(grads, 0.5),
        "momentum_0.99": average(grads, 0.99),
        "parameter": np.cumsum(-grads, axis=1),
    }
    columns = {Variable(name): values for name, values in features.items()}
    return _table(columns, -1e-3 * m / (np.sqrt(v) + 1e-8), runs, steps)


def tanh_table(seed: int = 0, runs: int = 20, coordinates: int = 25, steps: int = 40) -> Table:
    """Returns 0.1 tanh(-1.3 m_t - 0.45 g_t + 0.6 m_{t-1}) of normalised averages.

    m and g are the momentum and the gradient over the root of the second moment, as RNNProp sees
    them. Columns are both of them at two steps, a momentum and the gradient.
    """
    grads = _scaled_noise(seed, runs * coordinates, 600 + steps)
    root = np.sqrt(average(grads**2, 0.95)) + 1e-12
    m, g = average(grads, 0.95) / root, grads / root
    columns = {
        Variable("normalized_momentum"): m,
        Variable("normalized_momentum", 1): _lag(m, 1),
        Variable("normalized_gradient"): g,
        Variable("normalized_gradient", 1): _lag(g, 1),
        Variable("momentum_0.5"): average(grads, 0.5),
        Variable("gradient"): grads,
    }
    output = 0.1 * np.tanh(-1.3 * m - 0.45 * g + 0.6 * _lag(m, 1))
    return _table(columns, output, runs, steps)


# Each table, and the R2 on unseen runs that distillation is to reach.
SUITE: Mapping[str, tuple[Callable[[int], Table], float]] = MappingProxyType(
    {
        "sgd": (lambda seed: lag_table("sgd", seed), 1 - 1e-6),
        "linear lags": (lambda seed: lag_table("linear lags", seed), 0.999),
        "nonlinear mix": (lambda seed: lag_table("nonlinear mix", seed), 0.999),
        "momentum 0.6": (lambda seed: lag_table("momentum 0.6", seed), 0.999),
        "adam": (lambda seed: lag_table("adam", seed), 0.93),
        "adam from averages": (lambda seed: adam_table(seed), 0.9999),
        "tanh rule": (lambda seed: tanh_table(seed), 0.9999),
    }
)


@dataclasses.dataclass(frozen=True, eq=False)
class SanityRow:
    """What became of one known optimizer.

    Attributes:
        name: of `SUITE`.
        r_squared: of the chosen equation, on runs that nothing else has seen.
        required: what it is to be at least.
        nodes: of the equation.
        seconds: of all processors together.
        expression: the equation.
    """

    name: str
    r_squared: float
    required: float
    nodes: int
    seconds: float
    expression: Expression

    @property
    def passed(self) -> bool:
        """Whether R2 is as required."""
        return self.r_squared >= self.required


def default_searches(name: str) -> tuple[AbstractSearch, ...]:
    """Returns what the suite searches with: raw lags are long sums, which templates are good at."""
    if name in LAG_RULES:
        brief = OperonSearch(population=500, generations=20, tuned_generations=20, restarts=1)
        return (TemplateSearch(), brief)
    return (OperonSearch(),)


def run_sanity(
    names: Sequence[str] = tuple(SUITE),
    searches: Sequence[AbstractSearch] | None = None,
    seed: int = 0,
    progress: Progress = lambda done, total, what: None,
) -> list[SanityRow]:
    """Distils known optimizers and says how well.

    Args:
        names: keys of `SUITE`.
        searches: backends; those of `default_searches` if not given.
        seed: of tables, splits and searches.
        progress: called with the numbers of finished and of all optimizers, and what comes next.

    Raises:
        ValueError: if there is no such optimizer.
        ImportError: if a backend's library is not installed.
    """
    if unknown := [name for name in names if name not in SUITE]:
        raise ValueError(f"run_sanity(names={unknown}) are none of {', '.join(SUITE)}.")
    rows = []
    for done, name in enumerate(names):
        progress(done, len(names), name)
        make, required = SUITE[name]
        used = default_searches(name) if searches is None else searches
        table = make(seed)
        before = time.process_time()
        found = distill(table, used, (seed,), split_seed=seed)
        seconds, expression = time.process_time() - before, found.chosen.expression
        held_out, nodes = found.r_squared["test"], expression.complexity
        rows.append(SanityRow(name, held_out, required, nodes, seconds, expression))
    progress(len(names), len(names), "done")
    return rows


def average(values: Gradients, decay: float) -> Gradients:
    """Returns the exponential average of a history, m <- decay m + (1 - decay) x from zero."""
    averages = np.zeros_like(values)
    state = np.zeros(len(values))
    for step in range(values.shape[1]):
        state = decay * state + (1 - decay) * values[:, step]
        averages[:, step] = state
    return averages


def _lag(values: Gradients, lag: int) -> Gradients:
    """Returns the values some steps ago; zero before the start, where no row is recorded."""
    return np.pad(values, ((0, 0), (lag, 0)))[:, : values.shape[1]]


def _noise(seed: int, coordinates: int, steps: int, persistence: float) -> Gradients:
    """Returns autoregressive noise of unit variance."""
    fresh = np.random.default_rng(seed).normal(size=(coordinates, steps))
    return average(fresh, persistence) * np.sqrt((1 + persistence) / (1 - persistence))


def _scaled_noise(seed: int, coordinates: int, steps: int) -> Gradients:
    noise = _noise(seed, coordinates, steps, persistence=0.9)
    generator = np.random.default_rng(seed + 1)
    return noise * 10 ** generator.uniform(-4, -1, (coordinates, 1))


def _table(
    features: Mapping[Variable, Gradients], output: Gradients, runs: int, steps: int
) -> Table:
    """Returns the last steps of all coordinates as rows, coordinates dealt out to runs."""
    count = len(output)
    coordinate, step = np.divmod(np.arange(count * steps), steps)
    per_run = count // runs
    zeros = np.zeros(count * steps, int)
    return Table(
        columns=tuple(features),
        values=np.stack([one[:, -steps:].reshape(-1) for one in features.values()], axis=1),
        output=output[:, -steps:].reshape(-1),
        task=zeros,
        run=coordinate // per_run,
        tensor=zeros,
        coordinate=coordinate % per_run,
        step=step,
    )
