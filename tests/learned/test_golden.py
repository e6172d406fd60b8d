"""Learned optimizers against numbers that an independent implementation produced.

The files, and which formula each number comes from, are described in golden/README.md. Everything
runs in float32, as the numbers did.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.learned.features import accumulate, factored_axes, time_embedding
from lopt.learned.hyperparameters import Learnable

KEY = jax.random.key(0)
TENSORS = ("conv", "mat", "rank3", "row1", "scalar", "square", "vec", "wide")  # in tree order
# As a rule sees them: those of rank 1 first.
GROUP = sorted(TENSORS, key=lambda name: name not in ("scalar", "vec"))


def single(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def load(folder, name):
    with np.load(folder / f"{name}.npz") as file:
        return dict(file)


def below(numbers, prefix):
    """Returns the entries whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): n for name, n in numbers.items() if name.startswith(prefix)}


def check_bank(ours, expected, rtol=1e-5):
    """Checks a bank of a tensor against what was recorded of it, end to end."""
    recorded = [np.moveaxis(golden, -1, 0).reshape(golden.shape[-1], -1) for golden in expected]
    ours = ours.reshape(len(ours), -1)
    np.testing.assert_allclose(ours, np.concatenate(recorded, 1), rtol=rtol, atol=1e-7)


def perceptron(theta):
    """Returns our names for the weights of either perceptron, matrices with outputs first."""
    return {
        (name if "/" not in name else name[-1] + name.split("/")[0][-1]): weights.T
        for name, weights in theta.items()
    }


def mlp_theta(theta):
    return single({"features": (), "rule": perceptron(below(theta, "mlp."))})


def adafactor_theta(theta):
    decays = {name: value for name, value in theta.items() if name.endswith("decays")}
    return single({"features": decays, "rule": perceptron(below(theta, "nn/~/"))})


def run(learned, theta, numbers):
    """Returns the parameters after each of the recorded gradients, and the last state."""
    params, grads = (single(below(numbers, prefix)) for prefix in ("params0/", "grads/"))

    @jax.jit
    def trajectory(theta):
        optimizer = learned.optimizer(theta)

        def one_step(carry, inputs):
            params, state = carry
            grad, loss = inputs
            updates, state = optimizer.update(grad, state, params, value=loss)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        begin = params, optimizer.init(params)
        (_, state), steps = jax.lax.scan(one_step, begin, (grads, jnp.asarray(numbers["losses"])))
        return steps, state

    return trajectory(theta)


def check_params(steps, expected, start, atol):
    """Checks every parameter after every step, and that a no-op would have failed."""
    for name in TENSORS:
        golden = expected[name]
        assert steps[name].dtype == jnp.float32
        error = np.abs(steps[name] - golden).max()
        assert error <= 1e-5 * np.abs(golden).max(), (name, error)
        assert np.linalg.norm(steps[name] - golden) <= 1e-5 * np.linalg.norm(golden), name
        np.testing.assert_allclose(steps[name], golden, rtol=1e-5, atol=atol, err_msg=name)
        moved = golden - start[name][None]
        # The movement itself, beyond the rounding of parameters around it.
        rounding = 1e-6 * (1 + np.abs(golden).max())
        np.testing.assert_allclose(
            steps[name] - start[name][None], moved, rtol=2e-5, atol=rounding, err_msg=name
        )
        # Scalars happen to lie where the default theta of the Adafactor rule does nothing.
        assert name == "scalar" or np.abs(moved).max() > 20 * atol, f"{name}: a no-op would pass"


MLP_CASES = {
    "default": {},
    "big_step_h8": {"hidden": (8, 8), "exp_multiplier": 0.1, "step_multiplier": 1.0},
    "one_layer_h4": {"hidden": (4,), "exp_multiplier": 0.5, "step_multiplier": 0.1},
}
ADAFACTOR_CASES = {
    "default": {},
    "big_step_h4": {"exp_multiplier": 0.1, "step_multiplier": 1.0},
    "two_decays_h6": {
        "hidden": (6,),
        "exp_multiplier": 0.5,
        "step_multiplier": 0.1,
        "momentum_decays": (0.5, 0.95),
        "rms_decays": (0.9, 0.99),
        "adafactor_decays": (0.8, 0.99),
    },
}


@pytest.mark.parametrize("case", MLP_CASES)
def test_small_mlp_takes_the_recorded_steps(golden, case):
    numbers = load(golden, "mlp_lopt")
    learned, start = lopt.small_mlp(**MLP_CASES[case]), below(numbers, "params0/")
    steps, state = run(learned, mlp_theta(below(numbers, f"{case}/theta/")), numbers)
    atol = 1e-6 if case == "default" else 1e-5
    check_params(steps, below(numbers, f"{case}/params/"), start, atol)
    assert state.step == numbers[f"{case}/final_state/iteration"] == 10
    expected = below(numbers, f"{case}/final_state/rolling_features/m/")
    for name in GROUP:
        check_bank(state.features[name], [expected[name]])


@pytest.mark.parametrize("case", ADAFACTOR_CASES)
def test_adafactor_mlp_takes_the_recorded_steps(golden, case):
    numbers = load(golden, "adafac_mlp_lopt")
    learned, start = lopt.adafactor_mlp(**ADAFACTOR_CASES[case]), below(numbers, "params0/")
    steps, state = run(learned, adafactor_theta(below(numbers, f"{case}/theta/")), numbers)
    atol = 1e-6 if case == "default" else 1e-5
    check_params(steps, below(numbers, f"{case}/params/"), start, atol)
    expected = below(numbers, f"{case}/final_state/")
    assert state.step == expected["iteration"] == 10
    ours = state.features
    # What a tensor does not have is recorded as empty.
    second = [below(expected, f"fac_rolling_features/{v}/") for v in ("v_diag", "v_row", "v_col")]
    for name in GROUP:
        check_bank(ours.momentum[name], [expected[f"mom_rolling/m/{name}"]])
        check_bank(ours.rms[name], [expected[f"rms_rolling/rms/{name}"]])
        check_bank(ours.row[name], [second[which][name] for which in (0, 1)])
        if start[name].ndim > 1:
            check_bank(ours.col[name], [second[2][name]])


@pytest.mark.parametrize(
    ("learned", "count"),
    [
        (lopt.small_mlp(), 1762),
        (lopt.adafactor_mlp(), 197),
        (lopt.LearnableSGD(), 1),
        (lopt.learnable(optax.sgd, learning_rate=0.01, momentum=0.9), 2),
        (lopt.LearnableAdam(), 4),
    ],
)
def test_number_of_weights(learned, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(learned.init(KEY))) == count


def test_factored_axes_and_time(golden):
    numbers = load(golden, "accumulators")
    for name in TENSORS:
        axes = factored_axes(numbers[f"params0/{name}"].shape)
        assert (axes or (-1, -1)) == tuple(numbers[f"factored_dims/{name}"])
    numbers = load(golden, "mlp_lopt")
    times = jnp.asarray(numbers["tanh_embedding/iterations"])
    ours = jax.vmap(lambda step: time_embedding(step, jnp.float32))(times)
    np.testing.assert_allclose(ours, numbers["tanh_embedding/values"], rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("which", ["mlp6", "ada3", "odd"])
@pytest.mark.parametrize("kind", ["mom", "rms"])
def test_accumulators(golden, which, kind):
    numbers = load(golden, "accumulators")
    decays = jnp.asarray(numbers[f"decays/{which}"], jnp.float32)
    field = "m" if kind == "mom" else "rms"
    expected = below(numbers, f"{kind}/{which}/{field}/")
    grads = single(below(numbers, "grads/"))
    # As AdafactorFeatures uses it: momenta with the decays as they are, others with clipped ones.
    power, decays = (1, decays) if kind == "mom" else (2, jnp.clip(decays, 0, 1))

    @jax.jit
    def banks(grads):
        zeros = jax.tree.map(lambda g: jnp.zeros((len(decays), *g.shape[1:]), g.dtype), grads)

        def one_step(banks, grad):
            banks = jax.tree.map(lambda b, g: accumulate(decays, b, g**power), banks, grad)
            return banks, banks

        return jax.lax.scan(one_step, zeros, grads)[1]

    for name, ours in banks(grads).items():
        recorded = np.moveaxis(expected[name], -1, 1)
        np.testing.assert_allclose(ours, recorded, rtol=2e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("which", ["mlp6", "ada3", "odd"])
def test_factored_moments_and_preconditioned_gradient(golden, which):
    numbers = load(golden, "accumulators")
    decays = numbers[f"decays/{which}"].astype(np.float64)
    expected, count = below(numbers, f"fac/{which}/"), len(decays)
    features = lopt.learned.AdafactorFeatures((0.5,) * count, (0.5,), (0.5,) * count)
    # decay = 1 - exp(log(1/2) + 10 theta). A decay above one is out of theta's reach; one, to
    # which it is clipped, is theta = -infinity. One below zero is within reach.
    with np.errstate(divide="ignore"):
        shift = np.log(np.maximum(1 - decays, 0) / 0.5) / 10
    theta = {name: jnp.zeros_like(value) for name, value in features.init(KEY).items()}
    theta = single(theta | {"adafactor_decays": shift})
    grads = {
        name: g.reshape(10, *(g.shape[1:] or (1,))) for name, g in below(numbers, "grads/").items()
    }

    @jax.jit
    def trajectory(grads):
        def one_step(states, grad):
            new, columns, step = {}, {}, jnp.zeros((), jnp.int32)
            for name, g in grad.items():
                views, new[name] = features.update(theta, g, states[name], g, step)
                columns[name] = features.columns(views)
            return new, (new, columns)

        begin = {name: features.begin(g[0]) for name, g in grads.items()}
        return jax.lax.scan(one_step, begin, grads)[1]

    states, columns = trajectory(single(grads))
    for name in TENSORS:
        # After the stacks of gradient, parameter, momenta, rms, and two of quotients.
        factored = grads[name].ndim > 2
        pairs = [(columns[name][6], "y")]
        pairs += [(states[name].row, "v_row" if factored else "v_diag")]
        pairs += [(states[name].col, "v_col")] if factored else []
        for ours, field in pairs:
            recorded = np.moveaxis(expected[f"{field}/{name}"], -1, 1).reshape(ours.shape)
            # Decays of zero and below are among the odd ones; there, differences round more.
            rtol = 6e-5 if which == "odd" else 3e-5
            np.testing.assert_allclose(ours, recorded, rtol=rtol, atol=1e-7, err_msg=(field, name))


NAMES = {
    "log_lr": "learning_rate",
    "one_minus_momentum": "momentum",
    "one_minus_beta1": "b1",
    "one_minus_beta2": "b2",
    "log_epsilon": "eps",
}
LEARNABLES: dict[str, Learnable] = {
    "LearnableSGD": lopt.LearnableSGD(),
    "LearnableSGDM": lopt.learnable(optax.sgd, learning_rate=0.01, momentum=0.9),
    "LearnableAdam": lopt.LearnableAdam(),
}


def learnable_theta(numbers, prefix):
    return single({NAMES[name]: value for name, value in below(numbers, prefix).items()})


@pytest.mark.parametrize("name", LEARNABLES)
def test_learnables_take_the_recorded_steps(golden, name):
    numbers = load(golden, "learnable_and_metagrad")
    theta = learnable_theta(numbers, f"{name}/theta/")
    steps, _ = run(LEARNABLES[name], theta, numbers)
    check_params(steps, below(numbers, f"{name}/params/"), below(numbers, "params0/"), 1e-5)
    initial, recorded = LEARNABLES[name].init(KEY), learnable_theta(numbers, f"{name}/theta_init/")
    assert initial.keys() == recorded.keys()
    for parameter, value in initial.items():
        np.testing.assert_allclose(value, recorded[parameter], rtol=1e-4)


class Bowl(lopt.AbstractTask):
    """sum (p - centre)^2."""

    centre: jax.Array

    def init(self, key):
        return jnp.zeros_like(self.centre)

    def batch(self, key, split="train"):
        return ()

    def loss(self, params, batch):
        return jnp.sum((params - self.centre) ** 2)


class Regression(lopt.AbstractTask):
    """mean (X w + b - Y)^2."""

    inputs: jax.Array
    outputs: jax.Array

    def init(self, key):
        raise NotImplementedError

    def batch(self, key, split="train"):
        return ()

    def loss(self, params, batch):
        return jnp.mean((self.inputs @ params["w"] + params["b"][None] - self.outputs) ** 2)


def unrolled(learned, task, params, theta, num_steps):
    """Returns the loss before each step, and the loss at the end."""
    optimizer = learned.optimizer(theta)
    state, losses = lopt.unroll(
        task, optimizer, lopt.start(task, optimizer, params, KEY), num_steps
    )
    return losses, task.loss(state.params, ())


def check_gradient(ours, recorded):
    """Checks to 1e-4 of the largest entry of each leaf."""
    assert ours.keys() == recorded.keys()
    for name, expected in recorded.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(ours[name], expected, rtol=1e-4, atol=1e-4 * scale, err_msg=name)


@pytest.mark.parametrize("name", LEARNABLES)
@pytest.mark.parametrize("objective", ["final_loss_after_4", "avg_of_4_prestep_losses"])
def test_meta_gradients_of_learnables(golden, name, objective):
    numbers = load(golden, "learnable_and_metagrad")
    start, centre = (jnp.asarray(numbers[f"meta_problem/{which}"]) for which in ("p0", "c"))

    @jax.jit
    @jax.value_and_grad
    def meta_loss(theta):
        losses, final = unrolled(LEARNABLES[name], Bowl(centre), start, theta, 4)
        return final if objective == "final_loss_after_4" else jnp.mean(losses)

    # JAX 0.10 cannot differentiate Adam's b1 ** count under strict promotion: the derivative of
    # its own `pow` mixes integers and floats.
    with jax.numpy_dtype_promotion("standard"):
        value, grads = meta_loss(learnable_theta(numbers, f"{name}/theta/"))
    np.testing.assert_allclose(value, numbers[f"{name}/meta/{objective}"], rtol=1e-5)
    recorded = learnable_theta(numbers, f"{name}/meta_grad/{objective}/")
    # Adam's decays hardly matter within four steps: their float32 derivatives are what is left
    # after cancellation, so that they agree to the rounding of the others only.
    for decay in {"b1", "b2"} & set(recorded):
        rounding = 1e-6 * np.abs(recorded["learning_rate"])
        np.testing.assert_allclose(grads.pop(decay), recorded.pop(decay), rtol=0, atol=rounding)
    check_gradient(grads, recorded)


@pytest.mark.parametrize(
    ("name", "learned", "names"),
    [
        ("MLPLOpt_h4", lopt.small_mlp((4, 4), 0.1, 0.1), mlp_theta),
        ("AdafacMLPLOpt_h4", lopt.adafactor_mlp((4, 4), 0.1, 0.1), adafactor_theta),
    ],
)
def test_meta_gradients_of_rules(golden, name, learned, names):
    numbers = load(golden, "learnable_and_metagrad")
    task = Regression(*(jnp.asarray(numbers[f"meta_problem/{which}"]) for which in "XY"))
    start = single(below(numbers, "meta_problem/P0/"))

    @jax.jit
    def meta_loss(theta):
        losses, _ = unrolled(learned, task, start, theta, 5)
        return jnp.mean(losses), losses

    differentiate = jax.value_and_grad(meta_loss, has_aux=True)
    (value, losses), grads = jax.jit(differentiate)(names(below(numbers, f"{name}/theta/")))
    np.testing.assert_allclose(value, numbers[f"{name}/meta/avg_of_5_prestep_losses"], rtol=1e-5)
    np.testing.assert_allclose(losses, numbers[f"{name}/meta/losses"], rtol=1e-5)
    recorded = names(below(numbers, f"{name}/meta_grad/"))
    check_gradient(grads["rule"], recorded["rule"])
    if grads["features"]:
        check_gradient(grads["features"], recorded["features"])


# Values of an independent implementation for weights 0.5 sin(0.37 k + 0.1), k counting all leaves
# in its tree order; three steps with the gradient 2 p + 0.1 (i + 1) at step i = 0, 1, 2.
SINES = {
    "small_mlp": (
        lopt.small_mlp(),
        [f"{kind}{i}" for i in range(3) for kind in "bw"],
        [0.0992609411, -0.1980801076, 0.3014203310],
        [
            [-0.9971159697, -0.5987720490, -0.2018202990],
            [0.2004403472, 0.5960942507, 0.9971045852],
        ],
    ),
    "adafactor_mlp": (
        lopt.adafactor_mlp(),
        ["adafactor_decays", "momentum_decays"]
        + [f"{kind}{i}" for kind in "bw" for i in range(3)]
        + ["rms_decays"],
        [0.1012092009, -0.1987756491, 0.3012644053],
        [
            [-0.9988631010, -0.5989006758, -0.1987356097],
            [0.2011653483, 0.6009215117, 1.0012048483],
        ],
    ),
}


@pytest.mark.parametrize("name", SINES)
def test_sines_as_weights(name):
    learned, order, bias, weight = SINES[name]
    theta, count = learned.init(KEY), 0
    leaves = dict(theta["rule"])
    decays = dict(theta["features"] or {})
    for leaf in order:
        like = (leaves | decays)[leaf]
        if leaf in leaves:  # decays stay zero, but are counted
            k = jnp.arange(count, count + like.size)
            values = 0.5 * jnp.sin(0.37 * k.astype(float) + 0.1)
            leaves[leaf] = values.reshape(like.shape[::-1]).T  # there, inputs come first
        count += like.size
    theta = single({"features": theta["features"], "rule": leaves})
    params = single({"b": np.array([0.1, -0.2, 0.3]), "w": np.linspace(-1, 1, 6).reshape(2, 3)})
    optimizer = learned.optimizer(theta)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for i in range(3):
        grads = jax.tree.map(lambda p, i=i: 2 * p + jnp.float32(0.1 * (i + 1)), params)
        updates, state = update(grads, state, params, value=jnp.float32(1))
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["b"], np.array(bias), rtol=0, atol=2e-7)
    np.testing.assert_allclose(params["w"], np.array(weight), rtol=0, atol=2e-7)
