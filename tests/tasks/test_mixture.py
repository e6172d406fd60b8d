"""Mixtures: architectures, draws of each member, and means over several programs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lopt
from lopt.tasks import Build, InputScale, Mixture, Quadratic, QuadraticFamily, array_data

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 60)


def regression(num, slope, width=4):
    x = np.linspace(-1, 1, num)[:, None]
    network = Build(lopt.tasks.MultilayerPerceptron, 1, (width,), 1, jnp.tanh)

    return lopt.tasks.NetworkTask(array_data((x, slope * x)), network, squared_error, 4)


def squared_error(predict, rows):
    x, y = rows.arrays
    return {"loss": rows.mean(jnp.sum((predict(x) - y) ** 2, axis=1))}


def quadratic(curvature, noise=0.0):
    return Quadratic(jnp.full(2, curvature), jnp.ones(2), noise)


def test_arrays_and_numbers_of_examples_are_no_architecture():
    alike = [regression(20, 1.0), regression(30, 2.0), regression(50, 3.0)]
    family = Mixture(alike)
    assert len(family.architectures()) == 1
    slopes = set()
    for key in KEYS[:20]:
        x, y = family.draw(key).batch(key).arrays
        slope = np.unique(np.round(y / x, 6))
        assert slope.size == 1, "a batch mixed examples of two tasks"
        slopes.add(float(slope[0]))
    assert slopes == {1.0, 2.0, 3.0}


def test_each_member_is_as_likely_as_the_others():
    family = Mixture([quadratic(1.0), quadratic(2.0), quadratic(3.0)])
    keys = jax.random.split(KEY, 3000)
    drawn = jax.vmap(lambda key: family.draw(key).eigenvalues[0])(keys)
    shares = np.array([np.mean(drawn == value) for value in (1.0, 2.0, 3.0)])
    assert shares.sum() == 1
    assert np.all(np.abs(shares - 1 / 3) < 4 * np.sqrt(2 / 9 / len(keys)))


def test_members_that_are_families_draw_their_own_tasks():
    family = Mixture([QuadraticFamily(2), QuadraticFamily(2)])
    drawn = jax.vmap(lambda key: family.draw(key).eigenvalues)(KEYS)
    assert len(np.unique(drawn)) == 2 * len(KEYS)
    scaled = Mixture([InputScale(regression(n, 1.0), 2.0, 3.0) for n in (20, 30)])
    assert len(scaled.architectures()) == 1
    params, batch = scaled.draw(KEY).init(KEY), scaled.draw(KEY).batch(KEY)
    assert jnp.isfinite(scaled.draw(KEY).loss_and_state(params, (), batch)[0])


def test_architectures_are_told_apart_by_structure_shapes_and_settings():
    families = [
        regression(20, 1.0),
        QuadraticFamily(2),
        regression(20, 1.0, width=5),
        regression(40, 2.0),
        quadratic(1.0),
        quadratic(1.0, noise=0.1),
        Quadratic(jnp.ones(3), jnp.ones(3)),
    ]
    family = Mixture(families)
    parts = family.architectures()
    assert len(parts) == 6
    assert parts[1:] == (families[1], families[2], *families[4:])
    # A mixture within a mixture comes apart.
    assert len(Mixture([family, quadratic(2.0)]).architectures()) == 6
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(part.draw(KEY).init(KEY))) for part in parts]
    assert sizes == [13, 2, 16, 2, 2, 3]
    with pytest.raises(ValueError, match=r"Mixture\(families\) has 6 architectures.*lopt.Mean"):
        family.draw(KEY)


def test_a_mixture_of_nothing():
    with pytest.raises(ValueError, match=r"Mixture\(families=\(\)\) must.*try"):
        Mixture([])
