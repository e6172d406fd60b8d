"""What is refused, and that the error says how to put it right."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from toys import linear_toy, quadratic_toy

import lopt
from lopt.core.checks import LONGEST
from lopt.estimators import ConstantHorizon, LogUniformHorizon, RampedHorizon

INNER = quadratic_toy(10)
META, KEY = lopt.MetaTask(INNER), jax.random.key(0)
SHORT = LogUniformHorizon(1, 4)

BAD = [
    (lambda: lopt.PES(linear_toy(100), 30), r"^PES\(.*=30\) must divide .*=100\); try 25 or 50\.$"),
    (lambda: lopt.NRES(INNER, 3), r"^NRES\(truncation=3\)"),
    (lambda: lopt.PES(INNER, 2, 0.0), r"^PES\(sigma=0.0\)"),
    (lambda: lopt.NRES(INNER, 2, 0.0), r"^NRES\(sigma=0.0\)"),
    (lambda: lopt.PES(linear_toy(2 * 10**7), 3), "try 2 or 4"),
    (lambda: lopt.PES(linear_toy(2**30 - 35), 2), "try 1 or 1073741789"),
    (lambda: lopt.PES(INNER, 4, schedule=ConstantHorizon(10)), r"ConstantHorizon, 10; try 2 or 5"),
    (lambda: lopt.PES(INNER, 100, schedule=SHORT), "at most the longest .* LogUniform.* 4; try 4"),
    (lambda: linear_toy(2**31), f"horizon=2147483648.*try {LONGEST}"),
    (lambda: ConstantHorizon(10**12), f"length=10+.*try {LONGEST}"),
    (lambda: RampedHorizon(10, 2**31), f"last=2147483648.*try {LONGEST}"),
    (lambda: LogUniformHorizon(10, 2**31), f"longest=2147483648.*try {LONGEST}"),
    (
        lambda: lopt.InverseVariance(lopt.ES(INNER, 0.1), lopt.Reparameterized(META), 4),
        "sigma=0.1 and 0.01",
    ),
]


@pytest.mark.parametrize(("build", "message"), BAD)
def test_bad_numbers_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_the_longest_horizon_works(key):
    estimator = lopt.TruncatedBackprop(linear_toy(LONGEST), 2**29, stagger=True)
    clocks = jax.vmap(estimator.prepare, (None, 0))(jnp.asarray(0.1), jax.random.split(key, 8))
    assert set(clocks.clock.length.tolist()) == {LONGEST}
    assert set(clocks.clock.age.tolist()) == {0, 2**29}


@pytest.mark.parametrize("name", ["ES", "RankedES", "PES", "TruncatedES", "Reparameterized"])
def test_an_empty_theta_is_refused(name):
    estimator = {
        "ES": lambda: lopt.ES(INNER),
        "RankedES": lambda: lopt.RankedES(lopt.ES(INNER), 4),
        "PES": lambda: lopt.PES(INNER, 2),
        "TruncatedES": lambda: lopt.TruncatedES(INNER, 2),
        "Reparameterized": lambda: lopt.Reparameterized(lopt.MetaTask(INNER)),
    }[name]()
    mean, optimizer = lopt.Mean(estimator, 2), optax.sgd(1.0)
    with pytest.raises(ValueError, match=r"theta has no weights.*LearnableSGD"):
        lopt.unroll(mean, optimizer, lopt.start(mean, optimizer, {}, KEY), 1)


# Of the wrong kind: in a process of its own, as here the type checker of tests comes first.
WRONG = {
    "lopt.Mean(lopt.ES(inner), np.int64(4))": "positive integer, of Python's int and not int64",
    "lopt.Mean(lopt.ES(inner), True)": "Mean(num=True) must be a positive integer, of Python's",
    "lopt.Mean(lopt.ES(inner), 4, 2.0)": "Mean(at_once=2.0) must be a positive integer",
    "lopt.Mean(lopt.ES(inner), 4, '2')": "Mean(at_once='2')",
    "lopt.ES(inner, '0.1')": "ES(sigma='0.1') must be positive and finite; try 0.01.",
    "lopt.ES(inner, None)": "ES(sigma=None)",
    "lopt.ES(inner, True)": "ES(sigma=True)",
    "lopt.ES(inner, jnp.asarray(0.1))": "ES(sigma=",
    "lopt.GPES(inner, 2, 2.0)": "GPES(period=2.0) must be a positive integer",
    "lopt.GPES(inner, 2, 'x')": "GPES(period='x')",
    "lopt.OnlineForwardMode(inner, 2, 1.5)": "OnlineForwardMode(directions=1.5)",
    "lopt.PolicyGradient(inner, 0.1, 'a')": "PolicyGradient(decay='a') must be in [0, 1)",
    "lopt.estimators.RampedHorizon(jitter='a')": "RampedHorizon(jitter='a')",
    "lopt.InnerTraining(inner.tasks, inner.learned, 1.0)": "InnerTraining(horizon=1.0)",
    "lopt.learned.PerStep(0.1, True)": "PerStep(length=True) must be a positive integer",
    "hypergradients(inner, theta, key, sigma=np.inf)": "hypergradients(sigma=inf) must be positive",
    "Schedule(np.ones(5), np.ones(4))": "(learning_rates of shape (5,), momenta of shape (4,))",
    "hypergradients(inner, {}, key)": "hypergradients(theta) has no weights, and inner.learned",
    "hypergradients(inner, {'rate': 1.0}, key)": "{\"['rate']\": ()}, and inner.learned expects",
    "fit_noisy_quadratic(inner.tasks, jnp.ones(2), key, order=2.5)": "order=2.5) must be a",
}
SCRIPT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, optax, lopt
from lopt.analysis import Schedule, fit_noisy_quadratic
from lopt.analysis.hypergradients import hypergradients
key, theta = jax.random.key(0), {"learning_rate": jnp.zeros(())}
task = lopt.tasks.Quadratic(jnp.ones(2), jnp.zeros(2))
inner, said = lopt.InnerTraining(task, lopt.LearnableSGD(0.1), 10), []
for build in json.load(sys.stdin):
    try:
        eval(build)
        said.append("nothing")
    except (TypeError, ValueError) as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_what_is_of_the_wrong_kind_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps(list(WRONG)),
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout.splitlines()[-1])
    wrong = {
        build: message
        for (build, words), message in zip(WRONG.items(), said, strict=True)
        if words not in message
    }
    assert not wrong
