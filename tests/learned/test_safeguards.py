"""Safeguards: what each does to the updates, in closed form, and what it costs nothing to lose."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import quick_jit

import lopt
from lopt.learned import Chain, FallBack, Guided, Nominal, Odd

KEY = jax.random.key(0)
PARAMS = {"a": jnp.array([[1.0, -2.0]]), "b": jnp.array([0.5])}
GRADS = {"a": jnp.array([[3.0, 0.1]]), "b": jnp.array([-4.0])}


class Wild(lopt.AbstractLearnedOptimizer):
    """Moves every weight by theta, and remembers the sum of gradients."""

    def init(self, key):
        return jnp.ones(())

    def begin(self, theta, params, num_steps=None):
        return jax.tree.map(jnp.zeros_like, params)

    def update(self, theta, grads, state, params=None, *, value=None, **extra):
        return jax.tree.map(lambda g: 0 * g + theta, grads), jax.tree.map(jnp.add, state, grads)


def assert_close(ours, theirs, **tolerances):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, **{"rtol": 1e-12} | tolerances)


def step(learned, theta, grads=GRADS, state=None, params=PARAMS, **extra):
    state = learned.begin(theta, params) if state is None else state
    return learned.update(theta, grads, state, params, **extra)


def test_a_chain_is_that_of_optax_and_its_bound_is_learned():
    clip = lopt.learnable(optax.clip, max_delta=(1.0, "log"))
    learned = Chain((clip, optax.trace(0.9), functools.partial(optax.scale, step_size=-0.1)))
    theta, chain = learned.init(KEY), optax.chain(optax.clip(1.0), optax.trace(0.9))
    state, other = learned.begin(theta, PARAMS), chain.init(PARAMS)
    for _ in range(2):
        ours, state = learned.update(theta, GRADS, state, PARAMS)
        theirs, other = chain.update(GRADS, other, PARAMS)
        assert_close(ours, optax.tree.scale(-0.1, theirs))

    def first(theta):
        return step(learned, theta)[0]["a"][0, 0]

    # Where it clips, d (-0.1 bound) / d log(bound) = -0.1.
    np.testing.assert_allclose(jax.grad(first)(theta)[0]["max_delta"], -0.1)


def test_the_nominal_term_is_added_and_sees_the_same_gradients():
    learned = Nominal(lopt.LearnableSGD(0.1), optax.sgd(0.01))
    updates, _ = step(learned, learned.init(KEY))
    assert_close(updates, optax.tree.scale(-0.11, GRADS))


def test_limits_and_needs_are_those_of_the_parts():
    schedule = lopt.learned.PerStep(0.1, length=7)
    part = lopt.learnable(optax.sgd, learning_rate=schedule)
    cosine = lopt.learnable(optax.sgd, learning_rate=lopt.learned.Cosine(0.1))
    assert Nominal(optax.sgd(0.1), part).max_steps == Odd(part).max_steps == 7
    assert Chain((cosine,)).needs_num_steps
    assert not FallBack(part).needs_num_steps


def test_the_odd_part_is_odd_over_whole_runs():
    learned = lopt.dm(hidden=(2,))
    odd, minus = Odd(learned), functools.partial(optax.tree.scale, -1)
    theta = odd.init(KEY)
    update = quick_jit(odd.update)
    params, state = PARAMS, odd.begin(theta, PARAMS)
    mirrored, other = minus(PARAMS), odd.begin(theta, minus(PARAMS))
    for i in range(3):
        grads = jax.tree.map(lambda p, i=i: jnp.cos(p + i), params)
        ours, state = update(theta, grads, state, params)
        theirs, other = update(theta, minus(grads), other, mirrored)
        assert_close(ours, minus(theirs), atol=1e-18)
        assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(ours)) > 0
        params, mirrored = (optax.apply_updates(*x) for x in ((params, ours), (mirrored, theirs)))
    # The rule itself is not.
    ours, _ = step(learned, theta[0])
    theirs = step(learned, theta[0], minus(GRADS), None, minus(PARAMS))
    assert jnp.abs(ours["a"] + theirs[0]["a"]).max() > 0


@pytest.mark.standard_promotion
class TestFallBack:
    learned = FallBack(Wild(), functools.partial(optax.adam, learning_rate=0.1), limit=10.0)

    def test_a_step_within_the_limit_is_the_rules_own(self):
        theta = jnp.full((), -0.3), {}
        updates, state = step(self.learned, theta)
        assert_close(updates, jax.tree.map(lambda p: jnp.full_like(p, -0.3), PARAMS))
        assert state.count == 0

    @pytest.mark.parametrize("size", [1.01, 1e200, jnp.inf, jnp.nan])
    def test_a_step_beyond_it_is_adams(self, size):
        # Adam's first step is 0.1 in each coordinate: the limit is 1.
        updates, state = step(self.learned, (jnp.full((), size), {}))
        assert_close(updates, jax.tree.map(lambda g: -0.1 * jnp.sign(g), GRADS), rtol=1e-6)
        assert state.count == 1
        updates, state = step(self.learned, (jnp.full((), 0.5), {}), state=state)
        assert_close(updates, jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS))
        assert state.count == 1

    @pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -1e200])
    def test_a_gradient_that_is_not_finite_moves_nothing_and_spoils_no_memory(self, bad):
        theta, grads = (jnp.full((), 0.1), {}), GRADS | {"b": jnp.array([bad])}
        updates, state = step(self.learned, theta, grads)
        assert_close(updates, optax.tree.zeros_like(PARAMS))
        assert state.count == 1
        assert_close(state.parts[0], optax.tree.zeros_like(PARAMS))
        _, state = step(self.learned, theta, GRADS, state)
        assert_close(state.parts[0], GRADS)

    def test_adam_takes_over_where_it_has_kept_up(self):
        """From then on steps are those of an Adam that was there from the beginning."""
        adam = optax.adam(0.1)
        other, state = adam.init(PARAMS), self.learned.begin((jnp.zeros(()), {}), PARAMS)
        for i in range(4):
            grads = jax.tree.map(lambda p, i=i: jnp.sin(p + i), PARAMS)
            theirs, other = adam.update(grads, other)
            theta = jnp.full((), 0.01 if i < 3 else jnp.nan), {}
            ours, state = self.learned.update(theta, grads, state, PARAMS)
        assert_close(ours, theirs)

    def test_a_diverging_rule_trains_under_vmap_and_its_weights_have_a_derivative(self):
        task = lopt.tasks.Quadratic(jnp.array([1.0, 3.0]), jnp.array([0.0, 0.0]))
        learned = FallBack(lopt.LearnableSGD(), lopt.LearnableAdam(0.1))
        _, adam = learned.init(KEY)

        def final(rate):
            theta = {"learning_rate": jnp.log(rate)}, adam
            optimizer = learned.optimizer(theta)
            state = lopt.start(task, optimizer, task.init(KEY), KEY)
            state, losses = lopt.unroll(task, optimizer, state, 40)
            return losses[-1], (losses[0], state.opt_state.count)

        rates = jnp.array([0.1, 1e9])
        (last, (first, counts)), slopes = quick_jit(
            jax.vmap(jax.value_and_grad(final, has_aux=True))
        )(rates)
        assert (last < 0.05 * first).all()
        assert counts[0] == 0
        assert counts[1] > 30
        assert jnp.isfinite(slopes).all()
        assert slopes[0] != 0

    def test_bad_limits_are_refused(self):
        with pytest.raises(ValueError, match=r"FallBack\(limit=0.0\) must be positive"):
            FallBack(Wild(), limit=0.0)


def test_an_empty_chain_is_refused():
    with pytest.raises(ValueError, match="must have parts"):
        Chain(())


def test_guarded_optimizers_are_saved(tmp_path):
    adam = functools.partial(optax.adam, learning_rate=0.01)
    learned = FallBack(Chain((functools.partial(optax.clip, max_delta=1.0), Odd(lopt.dm()))), adam)
    theta = learned.init(KEY)
    lopt.save(tmp_path / "weights.safetensors", learned, theta)
    again, weights = lopt.load(tmp_path)
    assert_close(weights, theta)
    assert again.limit == 100.0
    assert again.fall_back.factory.keywords == {"learning_rate": 0.01}


def test_a_pupil_is_saved_with_its_share(tmp_path):
    learned = Guided(lopt.LearnableSGD(), lopt.LearnableAdam(), 0.25)
    lopt.save(tmp_path / "weights.safetensors", learned, learned.init(KEY))
    again, _ = lopt.load(tmp_path)
    assert again.share == 0.25
    closed = FallBack(lopt.dm(), optax.adam(0.1))
    with pytest.raises(TypeError, match=r"such as functools.partial\(optax.adam"):
        lopt.save(tmp_path / "weights.safetensors", closed, closed.init(KEY))
