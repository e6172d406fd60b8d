"""Symmetries put to use: penalties in the meta-objective, and projected updates."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import images, perceptron, start_at

import lopt
from lopt.analysis.dynamics import scripted_updates
from lopt.analysis.dynamics.checks import check_optimizer
from lopt.analysis.symmetry import (
    SymmetryPenalty,
    SymmetryProbe,
    broken_component,
    deviation,
    remove_breaking,
    rescale,
    translation,
)
from lopt.core import Step

W1, B1, W2, B2 = (f".layers[{i}].{name}" for i in (0, 1) for name in ("weight", "bias"))


def small():
    task = perceptron(jax.nn.relu)
    params = task.init(jax.random.key(0))
    return task, (translation(params, W2, B2), rescale(params, (W1, B1), W2))


LENGTH = jnp.asarray(5, jnp.int32)


def step_of(task, updates):
    params = task.init(jax.random.key(0))
    zero = jnp.zeros((), jnp.int32)
    loss = jnp.asarray(2.0)
    return Step(zero, jax.random.key(0), params, (), (), loss, params, updates)


@pytest.mark.parametrize("measure", ["signed", "absolute", "cosine"])
def test_the_penalty_is_the_mean_deviation(measure):
    task, generators = small()
    params = task.init(jax.random.key(0))
    updates = jax.tree.map(lambda leaf: leaf**3 + 0.1, params)
    penalty = SymmetryPenalty(generators, -0.5, measure)
    found = [getattr(deviation(g, params, updates), measure) for g in generators]
    expected = 2.0 - 0.5 * sum(abs(float(each)) for each in found) / 2
    np.testing.assert_allclose(penalty(task, step_of(task, updates), LENGTH), expected, rtol=1e-12)


def test_the_penalty_takes_params_as_constants():
    task, generators = small()
    params = task.init(jax.random.key(0))
    updates = jax.tree.map(lambda leaf: leaf**3 + 0.1, params)

    def value(params, updates):
        step = step_of(task, updates)
        step = Step(step.step, step.key, params, (), (), step.loss, params, updates)
        return SymmetryPenalty(generators, 1.0)(task, step, LENGTH)

    of_params, of_updates = jax.grad(value, argnums=(0, 1))(params, updates)
    assert float(optax.tree.norm(of_params)) == 0
    assert float(optax.tree.norm(of_updates)) > 0
    # At updates that break nothing the derivative is a number too.
    still = jax.tree.map(jnp.zeros_like, updates)
    assert bool(jnp.isfinite(optax.tree.norm(jax.grad(value, argnums=1)(params, still))))


@pytest.mark.slow
@pytest.mark.standard_promotion
def test_meta_training_with_the_penalty_lowers_deviations():
    task = lopt.tasks.mlp_classification(images(4), (4,), batch_size=16)
    params = task.init(jax.random.key(0))
    generators = (translation(params, W2, B2), rescale(params, (W1, B1), W2))
    learned, key = lopt.small_mlp(), jax.random.key(1)
    theta = learned.init(key)
    # Penalties alone: the base is worth nothing.
    penalty = SymmetryPenalty(generators, 1.0, "cosine", base=nothing)
    meta = lopt.MetaTask(lopt.InnerTraining(task, learned, 5, objective=penalty))
    outer = optax.adam(1e-2)
    state = lopt.start(meta, outer, theta, key)
    _, losses = lopt.unroll(meta, outer, state, 20)
    assert bool(jnp.all(jnp.isfinite(losses)))
    assert float(jnp.mean(losses[-5:])) < 0.9 * float(jnp.mean(losses[:5]))


def nothing(task, step, num_steps):
    return jnp.zeros_like(step.loss)


def test_the_broken_component_is_the_orthogonal_projection():
    task, generators = small()
    params = start_at(task, optax.sgd(0.1)).params
    direction = jax.tree.map(lambda leaf: jnp.cos(7 * leaf), params)
    broken = broken_component(generators, params, direction)
    flat = jax.vmap(lambda tree: jax.flatten_util.ravel_pytree(tree)[0])
    tangents = jnp.concatenate([flat(g.tangents(params)) for g in generators])
    towards = jax.flatten_util.ravel_pytree(direction)[0]
    shares, *_ = np.linalg.lstsq(np.asarray(tangents).T, np.asarray(towards), rcond=None)
    np.testing.assert_allclose(
        jax.flatten_util.ravel_pytree(broken)[0], tangents.T @ shares, atol=1e-12
    )


@pytest.mark.standard_promotion
@pytest.mark.parametrize("make", [optax.adam, optax.lion])
def test_projected_optimizers_break_nothing_and_learn(make):
    task = lopt.tasks.mlp_classification(images(4), (6,), batch_size=32)
    params = task.init(jax.random.key(0))
    generators = (translation(params, W2, B2), rescale(params, (W1, B1), W2))
    probe = SymmetryProbe(generators)
    found = {}
    for name, optimizer in (
        ("plain", make(3e-3)),
        ("projected", remove_breaking(make(3e-3), generators)),
    ):
        state = start_at(task, optimizer)
        _, (found[name], loss) = lopt.unroll(
            task, optimizer, state, 30, record=lambda step: (probe(step), step.loss)
        )
        assert float(jnp.mean(loss[-5:])) < float(jnp.mean(loss[:5]))
    for generator in generators:
        assert float(jnp.max(found["projected"][generator.name].updates.cosine)) < 1e-12
        assert float(jnp.min(found["plain"][generator.name].updates.cosine)) > 1e-3


def test_half_of_the_projection_removes_half():
    task, generators = small()
    params = start_at(task, optax.sgd(0.1)).params
    grads = jax.tree.map(jnp.cos, params)
    sign = optax.sign_sgd(0.1)
    whole, _ = sign.update(grads, sign.init(params), params)
    whole = deviation(generators[1], params, whole, units=True)
    optimizer = remove_breaking(sign, generators, 0.5)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    half = deviation(generators[1], params, updates, units=True)
    np.testing.assert_allclose(half.units, 0.5 * whole.units, rtol=1e-10)


def test_bad_input_is_refused():
    task, generators = small()
    params = task.init(jax.random.key(0))
    optimizer = remove_breaking(optax.sgd(0.1), generators)
    with pytest.raises(ValueError, match=r"needs params.*try optimizer\.update"):
        optimizer.update(params, optimizer.init(params))
    with pytest.raises(ValueError, match="at least one symmetry"):
        remove_breaking(optax.sgd(0.1), ())
    with pytest.raises((ValueError, TypeError), match=r"measure.*most"):
        SymmetryPenalty(generators, 1.0, "most")
    with pytest.raises(ValueError, match="strength=nan"):
        SymmetryPenalty(generators, float("nan"))
    with pytest.raises((ValueError, TypeError), match="base"):
        SymmetryPenalty(generators, 1.0, base=0.5)


def test_the_loss_is_handed_on_to_optimizers_that_need_it():
    task, generators = small()
    params = task.init(jax.random.key(0))
    optimizer = remove_breaking(optax.polyak_sgd(), generators)
    state = optimizer.init(params)
    updates, _ = optimizer.update(params, state, params, value=jnp.asarray(1.0))
    assert float(optax.tree.norm(updates)) > 0


@pytest.mark.standard_promotion
def test_what_an_optimizer_lacks_is_named():
    task, generators = small()
    params = task.init(jax.random.key(0))

    def update(optimizer, **extra):
        optimizer = remove_breaking(optimizer, generators)
        return optimizer.update(params, optimizer.init(params), params, **extra)[0]

    plateau = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(0.5, patience=1))
    for optimizer in (optax.polyak_sgd(), plateau):
        with pytest.raises(ValueError, match=r"needs value .*try .*value=\.\.\.\), where value is"):
            update(optimizer)
    value = jnp.asarray(1.0)
    with pytest.raises(ValueError, match=r"needs grad, value_fn for its optimizer"):
        update(optax.lbfgs(), value=value)
    updates = update(
        optax.lbfgs(), value=value, grad=params, value_fn=lambda p: optax.tree.norm(p) ** 2
    )
    assert float(optax.tree.norm(updates)) > 0
    # What an optimizer says itself stays as it is.
    own = optax.stateless(lambda updates, params: updates + 1)
    with pytest.raises(TypeError, match="unsupported operand"):
        update(own)


@pytest.mark.standard_promotion
def test_no_line_search_where_there_is_nothing_to_search():
    grads = jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"scripted_updates\(optimizer\).*needs grad, value_fn"):
        scripted_updates(optax.lbfgs(), grads)
    with pytest.raises(ValueError, match="linesearch=None"):
        scripted_updates(optax.lbfgs(), grads, losses=jnp.ones(3))
    found = scripted_updates(optax.lbfgs(0.1, linesearch=None), grads)
    assert bool(jnp.all(jnp.isfinite(found)))


@pytest.mark.parametrize("strength", [float("nan"), float("inf")])
def test_a_share_is_finite(strength):
    _, generators = small()
    with pytest.raises(ValueError, match=rf"strength={strength}\) must be a finite number"):
        remove_breaking(optax.sgd(0.1), generators, strength)


def test_what_is_no_optimizer_is_named():
    # Under the tests' type checker these never arrive at the functions themselves.
    with pytest.raises(TypeError, match=r"optimizer=.*try .*learned\.optimizer\(theta\)"):
        check_optimizer("remove_breaking", "optimizer", lopt.small_mlp(), extra=True)
    steps = optax.MultiSteps(optax.sgd(0.1), 2)
    with pytest.raises(TypeError, match=r"try its gradient_transformation\(\)"):
        check_optimizer("remove_breaking", "optimizer", steps, extra=True)
