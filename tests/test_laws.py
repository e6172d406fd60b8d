"""The five laws of the house. The third, the border, has a file of its own: test_border.py."""

import json
import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import linear_toy, quadratic_toy

import lopt

# Adam.
pytestmark = pytest.mark.standard_promotion


def digits():
    return lopt.load_images("digits", size=8)


def batch_norm():
    return lopt.tasks.batch_norm_classification(digits(), widths=(8,), batch_size=16)


def init_params(estimator, key):
    if isinstance(estimator, lopt.AbstractTask):
        return estimator.init(key)
    return jnp.asarray(-2.0)


ESTIMATORS = {
    "noisy quadratic": lambda: lopt.tasks.Quadratic(jnp.ones(3), jnp.zeros(3), noise_scale=0.3),
    "batch norm": batch_norm,
    "full gradient": lambda: lopt.MetaTask(quadratic_toy(4)),
    "truncated": lambda: lopt.Mean(lopt.TruncatedBackprop(linear_toy(6), 2), 3),
    "ES": lambda: lopt.Mean(lopt.ES(linear_toy(4), 0.1), 3),
    "PES": lambda: lopt.Mean(lopt.PES(linear_toy(6), 2, 0.1), 3),
}


def assert_close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_semigroup(name, key):
    """m + n steps equal m steps followed by n: parameters, every state, every record."""
    estimator, optimizer = ESTIMATORS[name](), optax.adam(1e-2)
    state = lopt.start(estimator, optimizer, init_params(estimator, key), key)
    whole, losses = lopt.unroll(estimator, optimizer, state, 7)
    part, first = lopt.unroll(estimator, optimizer, state, 3)
    part, second = lopt.unroll(estimator, optimizer, part, 4)
    np.testing.assert_allclose(jnp.concatenate([first, second]), losses, rtol=1e-12)
    assert_close(part, whole)


def everything(step):
    """A record of all that a step can see, keys as their data."""
    key = jax.random.uniform(step.key), step.dropped * jnp.ones(())
    return key, step.step, step.params, step.opt_state, step.loss, step.grads, step.updates


@pytest.mark.parametrize("name", ["batch norm", "PES"])
def test_products_that_are_kept_change_nothing(name, key):
    estimator, optimizer = ESTIMATORS[name](), optax.adam(1e-2)
    state = lopt.start(estimator, optimizer, init_params(estimator, key), key)
    assert_close(
        lopt.unroll(estimator, optimizer, state, 4, record=everything, keep_products=True),
        lopt.unroll(estimator, optimizer, state, 4, record=everything),
    )


@pytest.mark.parametrize("keywords", [{"segments": 2}, {"keep_products": True}])
def test_what_is_kept_changes_no_derivative(keywords, key):
    task = lopt.tasks.Quadratic(jnp.ones(3), jnp.zeros(3), noise_scale=0.3)

    def mean_length(rate, **keywords):
        optimizer = optax.sgd(rate, momentum=0.9)
        state = lopt.start(task, optimizer, jnp.arange(3.0), key)
        record = lambda step: jnp.sum(step.params**2) + jnp.sum(step.updates)  # noqa: E731
        return jnp.mean(lopt.unroll(task, optimizer, state, 6, record=record, **keywords)[1])

    found, plain = jax.grad(lambda r: mean_length(r, **keywords))(0.1), jax.grad(mean_length)(0.1)
    assert abs(plain) > 1e-3
    np.testing.assert_allclose(found, plain, rtol=1e-12)


@pytest.mark.parametrize("name", ["noisy quadratic", "batch norm"])
def test_unroll_equals_a_loop_in_python(name, key):
    estimator, optimizer = ESTIMATORS[name](), optax.sgd(0.1, momentum=0.9)
    params = estimator.init(key)
    state = lopt.start(estimator, optimizer, params, key)
    end, losses = lopt.unroll(estimator, optimizer, state, 5)

    opt_state, carried, twin = optimizer.init(params), state.estimator_state, []
    for step in range(5):
        batch = estimator.batch(jax.random.fold_in(key, step))
        loss, grads = jax.value_and_grad(
            lambda p, c=carried, b=batch: estimator.loss_and_state(p, c, b)[0]
        )(params)
        carried = estimator.loss_and_state(params, carried, batch)[1]
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        twin.append(loss)
    np.testing.assert_allclose(losses, jnp.stack(twin), rtol=1e-10)
    for a, b in zip(
        jax.tree.leaves((end.params, end.estimator_state)),
        jax.tree.leaves((params, carried)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-12)


def test_running_statistics_are_carried(key):
    """After many steps at rate zero they are the statistics of the data."""
    task = batch_norm()
    optimizer = optax.sgd(0.0)
    state = lopt.start(task, optimizer, task.init(key), key)
    before = state.estimator_state
    state, _ = lopt.unroll(task, optimizer, state, 200)
    everything = task.loss_and_state(state.params, before, task.everything("train"))[1]
    # One step moves the average a tenth of the way to the batch's own statistics.
    target = jax.tree.map(lambda new, old: (new - 0.9 * old) / 0.1, everything, before)
    np.testing.assert_allclose(state.estimator_state.mean[0], target.mean[0], atol=0.2)
    np.testing.assert_allclose(state.estimator_state.variance[0], target.variance[0], rtol=0.4)


def mean_and_error(estimator, theta, num, key):
    """Mean and standard error of one estimate over many particles that begin now."""
    keys = jax.random.split(key, 2 * num)
    states = jax.vmap(estimator.prepare, (None, 0))(theta, keys[:num])
    estimates, _ = jax.vmap(estimator.estimate, (None, 0, 0))(theta, states, keys[num:])
    grads = np.asarray(jax.tree.leaves(estimates.grads)[0])
    return grads.mean(), grads.std(ddof=1) / num**0.5


def smoothed_gradient(inner, theta, sigma, key):
    """E[L'(theta + e)] by Gauss-Hermite quadrature of the exact gradient."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(21)
    grad = jax.vmap(jax.grad(lambda t: inner.meta_loss({"learning_rate": t}, key)))
    values = grad(theta["learning_rate"] + sigma * jnp.asarray(nodes))
    return float(np.sum(weights * np.asarray(values)) / weights.sum())


class TestAgreement:
    """All unbiased estimators have one mean."""

    theta = {"learning_rate": jnp.log(jnp.asarray(0.1))}  # noqa: RUF012

    def inner(self):
        # One fixed starting point, so that theta's perturbation is all that is random.
        inner = quadratic_toy(8)
        return eqx.tree_at(lambda i: i.tasks, inner, Pinned(inner.tasks))

    def test_the_full_gradient_is_the_finite_difference(self, key):
        meta = lopt.MetaTask(self.inner())
        estimate, _ = meta.estimate(self.theta, (), key)

        def value(shift):
            return meta.loss({"learning_rate": self.theta["learning_rate"] + shift}, key)

        difference = (value(1e-5) - value(-1e-5)) / 2e-5
        np.testing.assert_allclose(estimate.grads["learning_rate"], difference, rtol=1e-8)

    def test_truncation_of_the_horizon_is_the_full_gradient(self, key):
        inner = self.inner()
        full, _ = lopt.MetaTask(inner).estimate(self.theta, (), key)
        whole = lopt.TruncatedBackprop(inner, 8)
        estimate, _ = whole.estimate(self.theta, whole.prepare(self.theta, key), key)
        np.testing.assert_allclose(estimate.loss, full.loss, rtol=1e-12)
        np.testing.assert_allclose(
            estimate.grads["learning_rate"], full.grads["learning_rate"], rtol=1e-12
        )

    def test_pes_with_truncation_of_the_horizon_is_es(self, key):
        inner = self.inner()
        pes, es = lopt.PES(inner, 8, 0.1), lopt.ES(inner, 0.1)
        one, _ = pes.estimate(self.theta, pes.prepare(self.theta, key), key)
        other, _ = es.estimate(self.theta, (), key)
        np.testing.assert_allclose(one.loss, other.loss, rtol=1e-12)
        np.testing.assert_allclose(
            one.grads["learning_rate"], other.grads["learning_rate"], rtol=1e-9
        )

    @pytest.mark.parametrize("sigma", [0.03, 0.3])
    def test_es_is_unbiased_for_the_smoothed_loss(self, sigma, key):
        inner = self.inner()
        mean, error = mean_and_error(lopt.ES(inner, sigma), self.theta, 50_000, key)
        assert abs(mean - smoothed_gradient(inner, self.theta, sigma, key)) < 4 * error

    def test_short_truncation_is_biased(self, key):
        """Averaged over the windows of an episode it is not the gradient; and by how much."""
        inner, window = self.inner(), 2
        truncated = lopt.TruncatedBackprop(inner, window, stagger=False)
        state = truncated.prepare(self.theta, key)
        grads = []
        for _ in range(4):
            estimate, state = truncated.estimate(self.theta, state, key)
            grads.append(float(estimate.grads["learning_rate"]))
        full, _ = lopt.MetaTask(inner).estimate(self.theta, (), key)

        # Closed form: x_t = c + (1 - a h)^t (x_0 - c), L_t = sum h (x_t - c)^2 / 2, and within a
        # window only the last t - start factors (1 - a h) depend on a.
        task, rate = inner.tasks.task, 0.1
        h, gap = np.asarray(task.eigenvalues), np.asarray(Pinned.point - task.centre)
        shrink = 1 - rate * h
        expected = []
        for start in range(0, 8, window):
            window_grads = [
                np.sum(h * gap**2 * shrink ** (2 * t - 1) * (t - start) * (-h)) * rate
                for t in range(start, start + window)
            ]
            expected.append(np.mean(window_grads))
        np.testing.assert_allclose(grads, expected, rtol=1e-10)
        assert abs(np.mean(grads)) < 0.5 * abs(float(full.grads["learning_rate"]))


class Pinned(lopt.AbstractTask):
    """A quadratic that always starts from the same point."""

    task: lopt.tasks.Quadratic
    point = np.array([2.0, 1.0, -1.0])

    def init(self, key):
        return jnp.asarray(self.point)

    def batch(self, key, split="train"):
        return self.task.batch(key, split)

    def loss(self, params, batch):
        return self.task.loss(params, batch)


class TestInvariance:
    """Gradients have no component along the symmetries of the network's loss."""

    def test_rescaling_of_relu_units(self, key):
        """w_in -> a w_in, b -> a b, w_out -> w_out / a does nothing: one generator per unit."""
        task = lopt.tasks.mlp_classification(digits(), (12,))
        params = task.init(key)
        estimate, _ = task.estimate(params, (), key)
        (first, second), (g1, g2) = params.layers, estimate.grads.layers
        incoming = jnp.sum(first.weight * g1.weight, axis=1) + first.bias * g1.bias
        outgoing = jnp.sum(second.weight * g2.weight, axis=0)
        assert float(jnp.max(jnp.abs(incoming))) > 1e-4
        np.testing.assert_allclose(incoming, outgoing, atol=1e-14)

    def test_translation_of_logits(self, key):
        """A constant added to all logits does nothing to the softmax."""
        task = lopt.tasks.mlp_classification(digits(), (12,), jnp.tanh)
        estimate, _ = task.estimate(task.init(key), (), key)
        last = estimate.grads.layers[-1]
        assert float(jnp.max(jnp.abs(last.weight))) > 1e-4
        np.testing.assert_allclose(jnp.sum(last.weight, axis=0), 0, atol=1e-14)
        np.testing.assert_allclose(jnp.sum(last.bias), 0, atol=1e-14)

    def test_scale_before_batch_norm(self, key):
        """The size of weights in front of a normalisation does nothing, up to its epsilon."""
        task = batch_norm()
        params = task.init(key)
        batch = task.everything("train")
        grads = jax.grad(lambda p: task.loss_and_state(p, task.prepare(p, key), batch)[0])(params)
        layer, g = params["network"].layers[0], grads["network"].layers[0]
        along = jnp.sum(layer.weight * g.weight, axis=1) + layer.bias * g.bias
        sizes = jnp.linalg.norm(layer.weight, axis=1) * jnp.linalg.norm(g.weight, axis=1)
        assert float(jnp.max(jnp.abs(along) / sizes)) < 1e-3

    def test_gradient_flow_conserves_what_rescaling_predicts(self, key):
        """|w_in|^2 + b^2 - |w_out|^2 of each unit drifts by the square of the rate only."""
        task = lopt.tasks.mlp_classification(digits(), (12,), batch_size=64)
        params = task.init(key)

        def conserved(p):
            first, second = p.layers
            return (
                jnp.sum(first.weight**2, axis=1) + first.bias**2 - jnp.sum(second.weight**2, axis=0)
            )

        drifts = []
        for refinement in (1, 2):
            rate, steps = 0.02 / refinement, 100 * refinement
            optimizer = optax.sgd(rate)
            fixed = FixedBatch(task, key)
            state = lopt.start(fixed, optimizer, params, key)
            state, _ = lopt.unroll(fixed, optimizer, state, steps)
            drifts.append(float(jnp.max(jnp.abs(conserved(state.params) - conserved(params)))))
        assert drifts[0] < 1e-2
        assert 1.7 < drifts[0] / drifts[1] < 2.3


class FixedBatch(lopt.AbstractTask):
    """A task that always sees the same batch, for which small steps are gradient flow."""

    task: lopt.AbstractTask
    key: jax.Array

    def init(self, key):
        return self.task.init(key)

    def batch(self, key, split="train"):
        return self.task.batch(self.key)

    def loss(self, params, batch):
        return self.task.loss(params, batch)


PLACES = """
import json, jax, jax.numpy as jnp, numpy as np, optax, lopt
from lopt.core.devices import device_mesh
jax.config.update("jax_num_cpu_devices", 4)

data = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1), np.uint8)
images = lopt.tasks.image_data(data, np.arange(40) % 3, None, None, 3, 4)
network = lopt.tasks.mlp_classification(images, (32,), batch_size=32)
learned, key, found = lopt.LearnableSGD(0.1), jax.random.key(0), []


def pes(task):
    return lopt.PES(lopt.InnerTraining(task, learned, 4), 2, 0.1)


for devices, at_once in ((1, 64), (1, None), (4, 4)):
    mean = lopt.Mean(pes(network), 64, at_once)
    with jax.set_mesh(device_mesh(devices)):
        state = lopt.start(mean, optax.sgd(0.1), learned.init(key), key)
        state, losses = lopt.unroll(mean, optax.sgd(0.1), state, 3)
    each = state.estimator_state.episodes.train.params.layers[0].bias
    rate = float(state.params["learning_rate"])
    found.append([devices, len(each.devices()), losses.tolist(), rate, each.tolist()])
small = lopt.tasks.QuadraticFamily(3)
sizes = [lopt.particle_mesh(lopt.Mean(pes(task), num)).size
         for task, num in ((small, 16), (network, 16), (network, 6))]
print(json.dumps([found, sizes]))
"""


def test_placement():
    """Devices and chunks change no particle, and the mean by the order of a sum at most."""
    done = subprocess.run(
        [sys.executable, "-c", PLACES],
        env=os.environ | {"JAX_ENABLE_X64": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found, sizes = json.loads(done.stdout.splitlines()[-1])
    for devices, used, *values in found:
        assert used == devices
        for value, expected in zip(values, found[0][2:], strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-9)
    assert sizes == [1, 4, 3]
