"""What is no number, hardly matters, or is not what it should be."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.analysis.dynamics import mirrored, noise_samples
from lopt.analysis.symmetry import (
    DiscreteMap,
    GradientFlow,
    HeavyBall,
    Ledger,
    ModelLoss,
    Place,
    attribute,
    broken_component,
    check_symmetry,
    continuous_law,
    deviation,
    drift,
    exact_law,
    missing_ranks,
    symmetries,
    translation,
)

PARAMS = {"w": jnp.ones((3, 2), jnp.float32)}
SGD = optax.sgd(0.1)


@pytest.mark.parametrize("size", [jnp.nan, jnp.inf, 1e30])
def test_no_cosine_of_what_is_no_number(size):
    direction = {"w": jnp.full((3, 2), size, jnp.float32)}
    assert jnp.isnan(deviation(translation(PARAMS, "['w']"), PARAMS, direction).cosine)


@pytest.mark.parametrize(("size", "cosine"), [(0.0, 0), (1e-20, 0), (1e-10, 1), (1e15, 1)])
def test_cosines_are_never_more_than_one(size, cosine):
    direction = {"w": jnp.full((3, 2), size, jnp.float32)}
    found = deviation(translation(PARAMS, "['w']"), PARAMS, direction).cosine
    assert found == pytest.approx(cosine, abs=1e-6)


@pytest.mark.slow
def test_layers_that_hardly_matter_have_no_false_symmetries(key):
    images = lopt.load_images("digits")
    task = lopt.tasks.mlp_classification(images, widths=(16,) * 6, activation=jax.nn.sigmoid)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), task.init(key))
    found = symmetries(task, key, params=params)
    kinds = [generator.kind for generator in (*found.generators, *found.nearly)]
    assert kinds == ["translation"]


def test_a_loss_that_is_no_number_tells_nothing(key):
    def loss(model, batch):
        return jnp.sum(model["w"] ** 2) + jnp.where(jnp.zeros_like(batch) < 1, jnp.nan, 0.0)

    task = ModelLoss(PARAMS, loss, lambda key: jax.random.uniform(key))
    with pytest.raises(ValueError, match=r"losses of \[nan nan nan\].*try other params"):
        symmetries(task, key)


def test_a_task_without_batches_can_be_examined(key):
    assert symmetries(lopt.tasks.Rosenbrock(), key).generators == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params: {"w": jnp.ones(3)}, "params has structure"),
        (lambda params: {}, "params has structure"),
        (lambda params: jax.tree.map(lambda leaf: leaf[:1], params), "has shape"),
        (lambda params: jax.tree.map(lambda leaf: leaf.astype(int), params), "i32|int32"),
    ],
)
def test_params_of_another_network_are_refused(key, change, message):
    task = lopt.tasks.mlp_classification(lopt.load_images("digits"), widths=(4,))
    with pytest.raises((ValueError, TypeError), match=message):
        symmetries(task, key, params=change(task.init(key)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda loss, sample: ModelLoss(PARAMS, None, sample), "evaluate"),
        (lambda loss, sample: ModelLoss(PARAMS, loss, 3), "sample"),
        (lambda loss, sample: ModelLoss({"w": jnp.ones(2, complex)}, loss, sample), "complex"),
        (lambda loss, sample: ModelLoss({"w": jnp.ones(2, int)}, loss, sample), "floating-point"),
        (lambda loss, sample: ModelLoss(PARAMS, lambda m, b: m["w"], sample), "one floating-point"),
        (lambda loss, sample: ModelLoss(PARAMS, lambda m, b: (loss(m, b), 1), sample), "auxiliary"),
        (
            lambda loss, sample: ModelLoss(PARAMS, lambda m, b: jnp.argmax(m["w"]), sample),
            r"dtype=int\d+",
        ),
    ],
)
def test_losses_that_are_none_are_refused(key, build, message):
    def loss(model, batch):
        return jnp.sum(model["w"] ** 2)

    with pytest.raises((ValueError, TypeError), match=message):
        symmetries(build(loss, lambda key: jnp.zeros(1)), key)


def test_what_is_no_symmetry_has_no_deviation():
    units = (Place("['w']"),)
    # Under the tests' type checker what is of another type never arrives.
    with pytest.raises(TypeError, match="DiscreteMap"):
        deviation(DiscreteMap("x", "permute", 3, units), PARAMS, PARAMS)
    shift = translation(PARAMS, "['w']")
    for measure in (deviation, lambda *given: broken_component([shift], *given[1:])):
        with pytest.raises(ValueError, match="direction has structure"):
            measure(shift, PARAMS, PARAMS | {"more": jnp.ones(1)})
    with pytest.raises((ValueError, TypeError), match="DiscreteMap"):
        attribute(np.zeros((1, 6)), PARAMS, [DiscreteMap("x", "permute", 3, units)])


@pytest.mark.parametrize(
    "build", [lambda: HeavyBall(0.1, jnp.inf), lambda: GradientFlow(None, 0.1)]
)
def test_what_moves_params_is_checked(build):
    with pytest.raises((ValueError, TypeError), match=r"weight_decay=inf|GradientFlow"):
        build()


def test_a_missing_loss_value_is_named():
    optimizer = mirrored(optax.contrib.reduce_on_plateau())
    with pytest.raises(ValueError, match="needs value"):
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)


def test_what_laws_and_ranks_cannot_use_is_refused(key):
    shift = translation(PARAMS, "['w']")
    with pytest.raises(ValueError, match=r"threshold=5\.0"):
        missing_ranks(lopt.tasks.Rosenbrock(), key, (), threshold=5.0)
    with pytest.raises(ValueError, match="at least one symmetry"):
        broken_component((), PARAMS, PARAMS)
    with pytest.raises((ValueError, TypeError), match=r"Ledger of one symmetry|ledger"):
        exact_law(shift, HeavyBall(0.1), {shift.name: None})
    numbers = jnp.ones((4, 7))
    with pytest.raises(ValueError, match=r"with 2 units; its.*\(4, 7\)"):
        continuous_law(shift, HeavyBall(0.1), Ledger(*[numbers] * 7))
    with pytest.raises(ValueError, match=r"rows of 6 numbers.*\(2, 7\)"):
        attribute(np.ones((2, 7)), PARAMS, [shift])


@pytest.mark.parametrize("measure", [symmetries, missing_ranks])
def test_the_one_who_was_asked_refuses(measure):
    with pytest.raises((ValueError, TypeError), match=f"{measure.__name__}\\(key=0|key"):
        measure(lopt.tasks.Rosenbrock(), 0)
    with pytest.raises(ValueError, match=rf"{measure.__name__}\(batches=0"):
        measure(lopt.tasks.Rosenbrock(), jax.random.key(0), batches=0)


@pytest.mark.parametrize("shape", [(3,), (0, 2), (2, 3, 4)])
def test_drifts_are_of_steps_and_units(shape):
    # Under the tests' type checker other axes never arrive.
    with pytest.raises((ValueError, TypeError), match="step"):
        drift(jnp.ones(shape))


@pytest.mark.parametrize("amounts", [[0.1, 0.2, 0.3], 0.1, np.ones(4)])
def test_amounts_are_an_array_of_one_for_each_unit(amounts):
    softmax = translation({"w": jnp.ones((2, 3))}, "['w']")
    with pytest.raises((ValueError, TypeError), match="amounts"):
        softmax.act({"w": jnp.ones((2, 3))}, amounts)


@pytest.mark.parametrize(
    "use",
    [
        lambda task, key: symmetries(task, key),
        lambda task, key: check_symmetry(translation(task.init(None), "['w']"), task, key),
        lambda task, key: missing_ranks(task, key),
        lambda task, key: noise_samples(
            task,
            optax.sgd(0.1),
            lopt.start(task, optax.sgd(0.1), PARAMS, jax.random.key(0)),
            key,
            4,
        ),
    ],
)
def test_old_keys_are_refused(use):
    with pytest.raises(TypeError, match=r"key=.*typed key; try jax\.random\.key\(0\)"):
        use(Softmax(), jax.random.PRNGKey(0))


class Softmax(lopt.AbstractTask):
    """A linear map, into a softmax."""

    def init(self, key):
        return PARAMS

    def batch(self, key, split="train"):
        return ()

    def loss(self, params, batch):
        return -jax.nn.log_softmax(params["w"] @ jnp.arange(2.0, dtype=jnp.float32))[0]
