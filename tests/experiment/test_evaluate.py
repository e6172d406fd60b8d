import io
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

import lopt
from lopt.experiment import cli
from lopt.experiment.baselines import BASELINES, Contestant, baselines, outward
from lopt.experiment.evaluation import suites
from lopt.experiment.evaluation.compare import compare
from lopt.experiment.evaluation.contestants import (
    named_optimizer,
    of_learned,
    of_optimizer,
)
from lopt.experiment.evaluation.summary import evaluation_report
from lopt.experiment.evaluation.trials import Trials
from lopt.experiment.runs.files import read_json, to_line
from lopt.experiment.trainings import OverDevices

# Adam.
pytestmark = pytest.mark.standard_promotion
FEW = ("Adam",)


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """A cache that begins empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOPT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def comparison(cache):
    """Adam at its default rate in the place of the learned optimizer."""
    task = lopt.tasks.mlp_classification(lopt.load_images("digits"), (8,), batch_size=32)
    evaluation = lopt.Evaluation("digits", task, horizon=33, trained_on=True)
    learned = lopt.learnable(optax.adam, learning_rate=1e-3)
    one = of_learned("learned", learned, learned.init(jax.random.key(0)), budgets=(1,))
    with jax.numpy_dtype_promotion("standard"):
        return compare(evaluation, [one, *baselines(FEW)])


def test_all_train_from_the_same_weights_on_the_same_batches(comparison):
    names = ["learned (1 trial)", *(f"{n} ({k})" for n in FEW for k in ("1 trial", "11 trials"))]
    assert [entry.name for entry in comparison.entries] == names
    first = [entry.found["train"].losses[:, 0] for entry in comparison.entries]
    for losses in first:
        np.testing.assert_allclose(losses, first[0], rtol=1e-6)
    assert len(set(first[0].tolist())) == 5
    learned, adam = comparison.entries[:2]
    np.testing.assert_allclose(comparison.final(learned), comparison.final(adam), rtol=1e-5)


def test_an_evaluated_run_is_a_plain_training_loop(comparison):
    """The twin: a Python loop with Optax for the first seed, which nothing was chosen on."""
    task = comparison.evaluation.task
    key = Trials(comparison.evaluation)._keys["report"][0]
    init_key, run_key = jax.random.split(key)
    optimizer, params = optax.adam(1e-3), task.init(init_key)
    state, losses, held_out = optimizer.init(params), [], []
    step = jax.jit(lambda p, b: jax.value_and_grad(task.loss)(p, b))
    loss_over = jax.jit(lambda p, split: task.loss(p, task.everything(split)), static_argnums=1)
    for i in range(33):
        if i in (0, 6, 9):
            held_out.append(float(loss_over(params, "test")))
        loss, grads = step(params, task.batch(jax.random.fold_in(run_key, i)))
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    found = comparison.of("learned").found["train"]
    np.testing.assert_allclose(found.losses[0], losses, rtol=1e-6)
    # Ten parts of three steps, after three first ones.
    np.testing.assert_allclose(found.held_out[0, :3], held_out, rtol=1e-6)
    np.testing.assert_allclose(found.train[0, 1], loss_over(params, "train"), 1e-6)


def test_tuned_is_no_worse_than_untuned_where_it_was_tuned(comparison):
    trials = Trials(comparison.evaluation)
    for name in FEW:
        tried = trials.results(BASELINES[name], BASELINES[name].grid, "validation")
        row, _, count = trials.choose(BASELINES[name], 11, "train")
        (best,) = trials.results(BASELINES[name], np.array([row]), "validation")
        assert count >= 11
        assert best.train[:, 1].mean() <= min(one.train[:, 1].mean() for one in tried)


def test_what_is_on_disk_is_not_trained_again(comparison, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("trained")

    monkeypatch.setattr(Trials, "_program", refuse)
    learned = comparison.of("learned").contestant
    again = compare(comparison.evaluation, [learned, *baselines(FEW)])
    assert again.rows() == comparison.rows()
    scale = next(cli.Path(cli.os.environ["LOPT_CACHE_DIR"]).glob("evaluations/scale_*.json"))
    found = read_json(scale)
    assert found["best"] == comparison.scale.best
    assert "Adam" in found["made_from"]
    assert found["seeds"] == 5


def parabola(eigenvalue=1.0):
    task = lopt.tasks.Quadratic(jnp.full(2, eigenvalue), jnp.zeros(2))
    return lopt.Evaluation(f"parabola {eigenvalue}", task, horizon=4)


def sgd(default, count=3, folder=None):
    def factory(values, num_steps):
        return optax.sgd(values[0])

    return Contestant("plain", factory, outward(default, count=count), (1, count), folder=folder)


def test_a_choice_at_the_edge_widens_the_grid_and_nothing_else():
    """On x^2 / 2 the best rate is 1, which ends at the minimum in one step."""
    trials = Trials(parabola())
    row, at_edge, count = trials.choose(sgd(0.01), 3, "train")
    # 0.0032, 0.01, 0.032 become 0.1, 0.32; then 1, 3.2, which is worse than 1.
    np.testing.assert_allclose(row, [1.0])
    assert (at_edge, count) == (False, 7)
    assert trials.choose(sgd(0.01), 1, "train")[1:] == (False, 1)
    assert trials.choose(sgd(1.0), 3, "train")[1:] == (False, 3)
    row, at_edge, count = trials.choose(sgd(1e-6), 3, "train")
    assert at_edge
    assert count == 11


def test_a_task_is_judged_on_the_scale_of_adam(cache, monkeypatch):
    task, scale = lopt.normalised_task(parabola()), Trials(parabola()).scale()

    def judged(task, loss):
        loss = jnp.asarray(loss)
        step = lopt.Step(jnp.asarray(0), jax.random.key(0), loss, (), (), loss, loss, loss)
        return float(lopt.tasks.own_objective(task, step, jnp.asarray(4)))

    best, init = scale.best["train"], scale.init["train"]
    assert 0 <= best < 0.1 * init
    np.testing.assert_allclose([judged(task, best), judged(task, init)], [0, 1], atol=1e-6)
    # What is known is not trained again, and counted as the report does.
    monkeypatch.setattr(Trials, "_program", None)
    steps = lopt.normalised_task(parabola(), adam_steps=True)
    for loss in np.linspace(scale.envelope[0], scale.envelope[-1], 7):
        np.testing.assert_allclose(judged(steps, loss), -scale.adam_steps(loss), rtol=1e-5)
    with pytest.raises(ValueError, match=r"'digits_mpl'; try 'digits_mlp'"):
        lopt.normalised_task("digits_mpl")


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path, monkeypatch):
    """Nine rates are trained four by four; the process ends after the first four."""
    contestant, calls, call = sgd(1.0, 9, tmp_path), [], OverDevices.__call__

    def killed(self, rows):
        calls.append(len(rows))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return call(self, rows)

    monkeypatch.setattr(OverDevices, "__call__", killed)
    with pytest.raises(KeyboardInterrupt):
        Trials(parabola()).results(contestant, contestant.grid, "validation")
    Trials(parabola()).results(contestant, contestant.grid, "validation")
    assert calls == [4, 4, 4, 1]
    # Another task, or the other seeds, are others' results.
    Trials(parabola(2.0)).results(contestant, contestant.grid[:1], "validation")
    Trials(parabola()).results(contestant, contestant.grid[:1], "report")
    assert len(calls) == 6
    (path,) = [one for one in tmp_path.glob("*") if "parabola 1.0" in one.read_text()]
    path.write_text(path.read_text().replace("results", "result"))
    Trials(parabola()).results(contestant, contestant.grid[:1], "validation")
    assert len(calls) == 7


def test_diverged_runs_are_not_chosen_and_count_as_failures():
    contestant = of_optimizer("wild", optax.sgd(1e200), "wild")
    found = compare(parabola(), [contestant])
    entry = found.entries[0]
    np.testing.assert_array_equal(found.normalised(entry, "train"), 2.0)
    assert found.area(entry, "train").min() > 1
    (row,) = found.verdicts()[:1]
    assert (row["optimizer"], row["training loss"]) == ("wild (1 trial)", "falls behind")


@pytest.mark.parametrize(
    ("made", "rate"),
    [(optax.sgd(0.5), 1.0), (lambda: optax.sgd(0.5), 1.0), (optax.adam, 1e-3), (optax.lion, 1e-3)],
)
def test_any_optax_optimizer_is_a_contestant(made, rate):
    one = of_optimizer("mine", made)
    np.testing.assert_allclose(one.grid[0], [rate])
    params = jnp.ones(3)
    optimizer = one.factory(jnp.array([rate]), 10)
    expected = made if hasattr(made, "init") else made() if rate == 1 else made(rate)
    updates = [o.update(params, o.init(params), params)[0] for o in (optimizer, expected)]
    np.testing.assert_allclose(*updates)


def test_an_optimizer_is_of_any_file_and_of_what_stands_there_now(tmp_path):
    """Absolute paths, partial functions, default rates; changed files are other optimizers."""
    path = tmp_path / "my-own.py"
    path.write_text(
        "import functools, optax\n"
        "part = functools.partial(optax.sgd, momentum=0.5)\n"
        "def own(*, learning_rate=0.3):\n    return optax.sgd(learning_rate)\n"
    )
    part, own = (named_optimizer(f"{path}:{name}", None) for name in ("part", "own"))
    assert (part.name, part.grid[0, 0], own.grid[0, 0]) == ("part", 1e-3, 0.3)
    updates, _ = own.factory(jnp.array([0.5]), 1).update(jnp.ones(2), optax.sgd(0.5).init(0))
    np.testing.assert_allclose(updates, -0.5)
    path.write_text(path.read_text().replace("momentum=0.5", "momentum=0.9"))
    assert named_optimizer(f"{path}:part", None).identity != part.identity
    with pytest.raises(ValueError, match="cannot be imported"):
        named_optimizer(f"{tmp_path}/none.py:part", None)


def test_tasks_whose_functions_or_streams_differ_are_told_apart():
    """Functions of one name, of which what is printed does not tell."""

    def task(power):
        def loss(predict, rows):
            return {"loss": rows.mean(jnp.sum(predict(rows.arrays) ** power, axis=1))}

        network = lopt.tasks.Build(lopt.tasks.MultilayerPerceptron, 1, (), 1, jnp.tanh)
        return lopt.tasks.NetworkTask(data, network, loss, 4)

    def kept(task):
        return Trials(lopt.Evaluation("x", task, 5))._about["task"]

    data = lopt.tasks.array_data(np.ones((20, 1)))
    assert kept(task(2)) == kept(task(2)) != kept(task(4))
    streams = [lopt.tasks.streamed_data([np.full(1, float(i))] * 20) for i in range(2)]
    assert repr(streams[0].train.read) != repr(streams[1].train.read)


def test_what_is_no_optimizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="b1, b2"):
        of_optimizer("mine", lambda b1, b2: optax.adam(1.0, b1, b2))
    for text in ("optax:nothing", "nowhere:adam", "adam"):
        with pytest.raises(ValueError, match="module:function"):
            named_optimizer(text, None)
    with pytest.raises(ValueError, match="one of: SGD"):
        baselines(["Adamm"])
    with pytest.raises(ValueError, match="one of: quick"):
        suites.suite("quik")


def test_images_that_meta_training_never_saw_are_parted_once():
    """Training, choices and the test have no image in common, and none that was trained on."""
    data = lopt.load_images("digits")
    found = suites.held_out(data)
    sides = [
        np.asarray(rows.images).reshape(len(rows.images), -1)[weights > 0]
        for rows, weights in (
            (lambda all: (all.arrays, np.asarray(all.weights)))(found.split(name).everything())
            for name in ("train", "valid_outer", "test")
        )
    ]
    assert [len(side) for side in sides] == [358, 89, 90]
    seen = {row.tobytes() for row in np.asarray(data.train.arrays.images)}
    rows = [{row.tobytes() for row in side} for side in sides]
    assert len(set.union(seen, *rows)) == len(seen) + sum(map(len, rows))


def test_choices_for_lopt_1_are_made_without_test_images():
    found = suites.suite("validation")
    assert len({one.name for one in found}) == len(found) >= 6
    data = lopt.load_images("digits", size=8)
    halved = suites.halved(data, data.valid_outer)
    sides = [
        {row.tobytes() for row in np.asarray(split.arrays.images)[first : first + count]}
        for split in (halved.valid_outer, halved.test, data.test)
        for first, count in [(int(split.first), int(split.count))]
    ]
    assert sides[0] | sides[1] == {
        row.tobytes() for row in np.asarray(data.valid_outer.arrays.images)
    }
    assert not sides[0] & sides[1]
    assert not (sides[0] | sides[1]) & sides[2]


def test_the_command_line_evaluates_and_writes_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = [
        lopt.Evaluation(f"width {d}", lopt.tasks.Rosenbrock(d, 0.1), 12, 5, d == 2, "width", d / 1)
        for d in (2, 4)
    ]
    few.append(parabola())
    monkeypatch.setitem(suites.SUITES, "quick", (lambda data: few,))
    words = "evaluate --suite quick --optimizer optax:sgd --baselines Adam"
    monkeypatch.setattr(sys, "argv", ["lopt", *words.split()])
    cli.main()
    output = " ".join(capsys.readouterr().out.split())
    for text in ("sgd (11 trials)", "tuned Adam", "Worst, by normalised loss", "width, 2 tasks"):
        assert text in output
    report = read_json(tmp_path / "evaluation" / "report.json")
    assert [one["name"] for one in report["evaluations"]] == ["width 2", "width 4", "parabola 1.0"]
    figures = {part["figure"]: part for part in report["parts"] if "figure" in part}
    assert {*figures} == {"curves.png", "profiles.png", "tuning.png", "sweep_width.png"}
    assert figures["sweep_width.png"]["shaded"] == [2.0]
    assert len(list((tmp_path / "evaluation" / "evaluations").glob("*sgd*.json"))) == 3
    names = [(row["optimizer"], row["budget"]) for row in report["evaluations"][2]["rows"]]
    assert names == [("sgd", 1), ("sgd", 11), ("Adam", 1), ("Adam", 11)]
    monkeypatch.setattr(sys, "argv", ["lopt", "evaluate", "--optimizer", "optax:sgd"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "add --suite quick" in capsys.readouterr().err


def test_the_report_is_written(comparison, tmp_path):
    outer = np.arange(20)
    log = {"meta_loss": 2.0 / (outer + 1), "finite": (outer != 3).astype(float)}
    log |= {"dropped": np.zeros(20), "seconds": np.full(20, 0.1)}
    output = io.StringIO()
    made = evaluation_report("run", [comparison], [log])
    made.show(Console(file=output, width=120))
    names = made.save(tmp_path)
    text = output.getvalue()
    for words in ("tuned Adam", "±", "learned (1 trial)", "Skipped outer steps: 1"):
        assert words in text
    report = read_json(tmp_path / "report.json")
    (evaluation,) = report["evaluations"]
    row = evaluation["rows"][0]
    values = np.asarray(row["final_losses"])
    shown = report["parts"][0]["rows"][0]["final loss"]
    np.testing.assert_allclose(shown["mean"], values.mean())
    np.testing.assert_allclose(shown["error"], values.std(ddof=1) / 5**0.5, rtol=1e-12)
    pictures = ["curves.png", "profiles.png", "tuning.png", "meta_training.png"]
    assert names == ["report.json", "report.html", *pictures]
    for name in pictures:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_the_page_opens_in_a_browser(comparison, tmp_path):
    """All pictures load, and tables are as wide as the page at most."""
    evaluation_report("run", [comparison]).save(tmp_path)
    page, script = (
        tmp_path / "report.html",
        """<script>addEventListener("load", () => {
        const pictures = [...document.images].filter(image => image.naturalWidth > 100).length
        const wide = document.documentElement.scrollWidth > innerWidth
        const rows = document.querySelectorAll("tr").length
        document.title = `${pictures} pictures, ${rows} rows, ${wide}`
    })</script>""",
    )
    page.write_text(page.read_text() + script)
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", profile]
    shown = subprocess.run(
        [BROWSER, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=60
    )
    rows = page.read_text().count("<tr")
    assert f"<title>3 pictures, {rows} rows, false</title>" in shown.stdout


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
def test_a_task_of_any_kind_is_evaluated(build):
    evaluation = lopt.Evaluation(build.__name__, build(), horizon=10)
    found = Trials(evaluation).entries(sgd(0.1, 1))[0].found["train"]
    assert set(found.metrics) == ({"loss", "largest"} if build is regression else {"loss"})
    assert found.train.shape == (5, 2)
    assert found.held_out.shape == (5, 11)
    assert found.train[:, 1].mean() < found.losses[:, 0].mean()
    np.testing.assert_allclose(found.held_out[:, -1], found.metrics["loss"])


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
