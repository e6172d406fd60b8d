"""Flows: densities against the change of variables, order of dependence, learning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import quick_jit

import lopt
from lopt.tasks import image_data, normalising_flow

KEY = jax.random.key(0)
KINDS = ["real_nvp", "autoregressive"]


def compiled(function):
    return quick_jit(lambda *arguments: function(*arguments))


def make_task(kind, pixels=3, **options):
    images = np.random.default_rng(0).uniform(size=(40, 1, 1, pixels))
    data = image_data(images, np.arange(40) % 3, None, None, 3, 1)
    options = {"widths": (4, 5), "layers": 3, "activation": jnp.tanh, "batch_size": 6} | options
    return normalising_flow(data, kind, **options)


def perturbed(task):
    """A flow with biases, and weights large enough to matter."""
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * jax.random.normal(KEY, leaf.shape), task.init(KEY)
    )


@pytest.mark.parametrize("quirks", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_densities_obey_the_change_of_variables(kind, quirks):
    flow = perturbed(make_task(kind, quirks=quirks))

    @quick_jit
    def all_of(x):
        z, jacobian = flow.transform(x)[0], jax.jacfwd(lambda x: flow.transform(x)[0])(x)
        return flow(x), z, jacobian

    for x in jnp.array([[0.1, 0.5, 0.9], [-1.0, 2.0, 0.3]]):
        density, z, jacobian = map(np.asarray, all_of(x))
        expected = np.linalg.slogdet(jacobian)[1] - (z**2).sum() / 2 - 1.5 * np.log(2 * np.pi)
        np.testing.assert_allclose(density, expected, rtol=1e-9)


def test_densities_integrate_to_one():
    flow = perturbed(make_task("autoregressive", pixels=2, layers=2))
    line = jnp.linspace(-15, 15, 301)
    points = jnp.stack(jnp.meshgrid(line, line), -1).reshape(-1, 2)
    densities = jnp.exp(quick_jit(jax.vmap(flow))(points))
    np.testing.assert_allclose(densities.sum() * (line[1] - line[0]) ** 2, 1, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_who_depends_on_whom(kind):
    flow = perturbed(make_task(kind, pixels=5, layers=1, widths=(7, 6)))
    jacobian = quick_jit(jax.jacfwd(lambda x: flow.transform(x)[0]))(jnp.linspace(0, 1, 5))
    expected = np.tril(np.ones((5, 5)))
    if kind == "real_nvp":  # the first two stay, and change the others
        expected = np.eye(5)
        expected[2:, :2] = 1
    np.testing.assert_array_equal(jnp.abs(jacobian) > 1e-12, expected)


def test_published_autoregression_leaves_each_pixel_alone():
    flow = perturbed(make_task("autoregressive", layers=1, quirks=True))
    jacobian = quick_jit(jax.jacfwd(lambda x: flow.transform(x)[0]))(jnp.linspace(0, 1, 3))
    np.testing.assert_array_equal(jnp.abs(jacobian) > 1e-12, np.eye(3))


def test_scales_are_bounded_but_in_the_published_real_nvp():
    for kind, quirks, finite in [
        ("real_nvp", False, True),
        ("real_nvp", True, False),
        ("autoregressive", False, True),
    ]:
        task = make_task(kind, quirks=quirks)
        params = jax.tree.map(lambda leaf: 1e5 * leaf - 1e5, task.init(KEY))
        loss = compiled(task.loss)(params, task.batch(KEY))
        assert bool(jnp.isfinite(loss)) == finite


def test_noise_is_in_the_batch_and_of_the_given_size():
    task = make_task("real_nvp")
    params, loss = task.init(KEY), compiled(task.loss)
    assert loss(params, task.batch(KEY)) == loss(params, task.batch(KEY))
    still = make_task("real_nvp", noise=0.0)
    batch = still.batch(KEY)
    pixels = jnp.asarray(batch.arrays.images, float).reshape(6, 3)
    densities = compiled(jax.vmap(params))(pixels)
    np.testing.assert_allclose(compiled(still.loss)(params, batch), -densities.mean(), rtol=1e-6)
    assert 0 < abs(loss(params, batch) + densities.mean()) < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_flows_learn(kind):
    task = make_task(kind, layers=2, batch_size=16)
    optimizer = optax.sgd(0.01)

    @quick_jit
    def run(key):
        return lopt.unroll(task, optimizer, lopt.start(task, optimizer, task.init(key), key), 200)

    _, losses = run(KEY)
    # Uniform pixels have log density 0; a standard normal gives about -3.3.
    assert losses[:10].mean() > 2
    assert losses[-10:].mean() < 0.5 * losses[:10].mean()


def test_bad_input():
    with pytest.raises(ValueError, match=r"Flow\(layers=0\).*try layers=4"):
        make_task("real_nvp", layers=0)
    with pytest.raises(ValueError, match=r"noise=-1\.0"):
        make_task("real_nvp", noise=-1.0)
