import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import lopt
from lopt.experiment.baselines import BASELINES
from lopt.experiment.evaluation.compare import Runs, compare, evaluation_report
from lopt.experiment.runs.files import read_json, to_line

# Adam.
pytestmark = pytest.mark.standard_promotion


@pytest.fixture(scope="module")
def comparison():
    """Adam at one of the rates of the grid in the place of the learned optimizer."""
    task = lopt.tasks.mlp_classification(lopt.load_images("digits"), (8,), batch_size=32)
    evaluation = lopt.Evaluation("digits", task, horizon=30, trained_on=True)
    learned = lopt.learnable(optax.adam, learning_rate=float(BASELINES["Adam"].rates[5]))
    theta = learned.init(jax.random.key(0))
    return compare(evaluation, learned, theta, jax.random.key(1))


def test_all_train_from_the_same_weights_on_the_same_batches(comparison):
    first = [runs.losses[:, 0] for runs in comparison.runs]
    assert [runs.name for runs in comparison.runs] == [
        "learned", "SGD", "momentum", "Adam", "Adam 0.001"
    ]  # fmt: skip
    for losses in first:
        np.testing.assert_allclose(losses, first[0], rtol=1e-12)
    assert len(set(np.asarray(first[0]).tolist())) == 5


def test_the_tuned_rate_is_the_best_of_the_grid(comparison):
    """No run of Adam at a rate of the grid ends lower than the tuned one."""
    adam, learned = comparison.of("Adam"), comparison.of("learned")
    assert not adam.at_edge
    assert adam.final_loss.mean() <= learned.final_loss.mean() + 1e-12
    if adam.learning_rate == BASELINES["Adam"].rates[5]:
        np.testing.assert_allclose(adam.losses, learned.losses, rtol=1e-9)


def test_an_evaluated_run_is_a_plain_training_loop(comparison):
    """The twin: a Python loop with Optax for the first seed."""
    task, key = comparison.evaluation.task, jax.random.split(jax.random.key(1), 5)[0]
    init_key, run_key = jax.random.split(key)
    optimizer, params = optax.adam(float(BASELINES["Adam"].rates[5])), task.init(init_key)
    state, losses = optimizer.init(params), []
    step = jax.jit(lambda p, b: jax.value_and_grad(task.loss)(p, b))
    for i in range(30):
        loss, grads = step(params, task.batch(jax.random.fold_in(run_key, i)))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    learned = comparison.of("learned")
    np.testing.assert_allclose(learned.losses[0], losses, rtol=1e-6)
    final = task.loss(params, task.everything("train"))
    np.testing.assert_allclose(learned.final_loss[0], final, rtol=1e-6)


def test_steps_to_reach_is_the_end_of_the_first_window_below():
    losses = np.stack([np.linspace(3, 0, 31), np.full(31, 2.0)])
    runs = Runs("x", None, False, losses, losses[:, -1], {"loss": losses[:, -1]})
    # The mean of ten steps that end at n is 3 - 0.1 (n - 5.5).
    assert runs.steps_to_reach(1.0) == [26]
    np.testing.assert_allclose(runs.final_level(), (0.45 + 2.0) / 2)


def test_the_report_is_written(comparison, tmp_path):
    outer = np.arange(20)
    log = {"meta_loss": 2.0 / (outer + 1), "finite": (outer != 3).astype(float)}
    log |= {"dropped": np.zeros(20), "seconds": np.full(20, 0.1)}
    output = io.StringIO()
    made = evaluation_report("run", [comparison], log)
    made.show(Console(file=output, width=120))
    names = made.save(tmp_path)
    text = output.getvalue()
    for words in ("tuned Adam", "±", "momentum", "Skipped outer steps: 1"):
        assert words in text
    report = read_json(tmp_path / "report.json")
    (evaluation,) = report["evaluations"]
    row = evaluation["rows"][0]
    values = np.asarray(row["final_losses"])
    shown = report["parts"][0]["rows"][0]["final loss"]
    np.testing.assert_allclose(shown["mean"], values.mean())
    np.testing.assert_allclose(shown["error"], values.std(ddof=1) / 5**0.5, rtol=1e-12)
    assert names == ["report.json", "report.html", "curves.png", "meta_training.png"]
    for name in names[2:]:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("fields", "message"), [({"horizon": 0}, "horizon=0"), ({"num_seeds": 4}, "num_seeds=4")]
)
def test_bad_evaluations_are_refused(comparison, fields, message):
    arguments = {"name": "x", "task": comparison.evaluation.task, "horizon": 5} | fields
    with pytest.raises(ValueError, match=message):
        lopt.Evaluation(**arguments)


def test_losses_that_are_not_finite_become_null():
    assert to_line({"a": float("nan"), "b": [float("inf")]}) == '{"a": null, "b": [null]}\n'


def language_model():
    """Characters that follow one another in a circle: 2 3 4 0 1 2."""
    text = (np.arange(60)[:, None] + np.arange(6)) % 5

    def next_character(predict, rows):
        targets = jax.nn.one_hot(rows.arrays[:, 1:], 5)
        losses = optax.softmax_cross_entropy(predict(rows.arrays[:, :-1]), targets)
        return {"loss": rows.mean(losses.mean(axis=1))}

    network = lopt.tasks.InitApply(
        lambda key: jax.random.normal(key, (5, 5)), lambda table, characters: table[characters]
    )
    return lopt.tasks.NetworkTask(lopt.tasks.array_data(text), network, next_character, 8)


def regression():
    x = np.linspace(-1, 1, 60)[:, None]

    def squared_error(predict, rows):
        inputs, outputs = rows.arrays
        squares = jnp.sum((predict(inputs) - outputs) ** 2, axis=1)
        return {"loss": rows.mean(squares), "largest": jnp.max(squares)}

    network = lopt.tasks.Build(lopt.tasks.MultilayerPerceptron, 1, (4,), 1, jnp.tanh)
    data = lopt.tasks.array_data((x, np.sin(3 * x)))
    return lopt.tasks.NetworkTask(data, network, squared_error, 8)


def quadratic():
    return lopt.tasks.Quadratic(jnp.ones(2), jnp.zeros(2), noise_scale=0.1)


@pytest.mark.parametrize("build", [language_model, regression, quadratic])
def test_a_task_of_any_kind_is_evaluated_and_reported(build, tmp_path):
    task, learned = build(), lopt.LearnableSGD(0.1)
    evaluation = lopt.Evaluation(build.__name__, task, horizon=10)
    comparison = compare(evaluation, learned, learned.init(jax.random.key(0)), jax.random.key(1))
    runs = comparison.of("learned")
    assert set(runs.metrics) == ({"loss", "largest"} if build is regression else {"loss"})
    assert runs.final_loss.shape == runs.metrics["loss"].shape == (5,)
    assert runs.final_loss.mean() < runs.losses[:, 0].mean()
    output = io.StringIO()
    log = dict.fromkeys(("meta_loss", "finite", "dropped", "seconds"), np.ones(1))
    report = evaluation_report("run", [comparison], log)
    report.show(Console(file=output, width=120))
    report.save(tmp_path)
    assert "test loss" in output.getvalue()
    (summary,) = read_json(tmp_path / "report.json")["evaluations"]
    np.testing.assert_allclose(summary["rows"][0]["test"]["loss"], runs.metrics["loss"])


class WithoutLoss(lopt.AbstractTask):
    def init(self, key):
        return jnp.zeros(())

    def batch(self, key, split="train"):
        return ()

    def loss(self, params, batch):
        return params

    def metrics(self, params, state, batch):
        return {"error": params}


def test_a_task_whose_metrics_lack_the_loss_is_refused():
    with pytest.raises(
        ValueError, match=r"Evaluation\(task=WithoutLoss.*error; must have \"loss\""
    ):
        lopt.Evaluation("x", WithoutLoss(), 5)
