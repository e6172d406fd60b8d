"""Published rules and networks per tensor: golden numbers, slow twins, invariants."""

import functools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lopt
from lopt.learned import Guided, Tensorwise
from lopt.learned.hierarchical import Hierarchical, NNAdam
from lopt.learned.velo import VeLO

KEY = jax.random.key(0)
NUMBERS = {}


def load(path):
    if path not in NUMBERS:
        with np.load(path) as file:
            NUMBERS[path] = dict(file)
    return NUMBERS[path]


def below(numbers, prefix):
    return {name.removeprefix(prefix): n for name, n in numbers.items() if name.startswith(prefix)}


def single(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


def check(learned, theta, numbers, case, atol):
    """Checks every parameter after each of ten recorded gradients, in float32."""
    start = below(numbers, "params0/")
    params, grads, losses = single((start, below(numbers, "grads/"), numbers["losses"]))

    @jax.jit
    def trajectory(theta, params):
        optimizer = learned.optimizer(theta, 100)

        def one_step(carry, inputs):
            params, state = carry
            updates, state = optimizer.update(inputs[0], state, params, value=inputs[1])
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(one_step, (params, optimizer.init(params)), (grads, losses))[1]

    steps = trajectory(single(theta), params)
    for name, golden in below(numbers, f"{case}/params/").items():
        assert steps[name].dtype == jnp.float32
        np.testing.assert_allclose(steps[name], golden, rtol=1e-5, atol=atol, err_msg=name)
        assert np.abs(golden - start[name]).max() > 20 * atol, f"{name}: a no-op would pass"


RULES = {
    "celo2/weights.npz": ("celo2_orthogonalized", 347, 1e-6),
    "celo/theta.state": ("celo/num_steps100", 37089 - 1281, 1e-5),
    "celo_adam/theta.state": ("celo_adam/num_steps100", 36865 - 1216, 1e-6),
}


@pytest.mark.parametrize("file", RULES)
def test_published_weights_take_the_recorded_steps(published, file):
    case, count, atol = RULES[file]
    learned, theta = lopt.load_published(published / file, file.partition("/")[0])
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == count
    check(learned, theta, load(published / "golden/published_rules.npz"), case, atol)


def cell(theta):
    """Returns our form of an LSTM: gates in another order, and a forget gate without the one."""
    arrays = {}
    for name in "wb":
        into, candidate, forget, out = np.split(theta[f"rnn_params/rnn.linear/{name}"], 4, -1)
        arrays[name] = np.concatenate([into, forget + (name == "b"), candidate, out], -1).T
    memory = tuple(theta[f"lstm_init_state/{name}"][0] for name in ("hidden", "cell"))
    return {"cell": arrays, "memory": memory}


def layer(theta, name):
    return {"w": theta[f"{name}/w"].T, "b": theta[f"{name}/b"]}


@pytest.mark.parametrize(
    ("case", "controller"),
    [
        ("nn_adam_default", NNAdam()),
        ("nn_adam_perturbed_h8", NNAdam(hidden=8, multiplier=0.1, decay=0.01)),
    ],
)
def test_nn_adam_takes_the_recorded_steps(golden, case, controller):
    numbers = load(golden / "nn_adam_rnn_mlp.npz")
    theta = below(numbers, f"{case}/theta/")
    change = layer(theta, "rnn_to_controls_params/rnn_to_controls")
    names = ("lr", "beta1", "beta2", "epsilon")
    initial = np.stack([theta[f"per_layer_{name}"] for name in names])
    ours = {"network": cell(theta) | {"change": change}, "initial": initial}
    # There, 1 - b2 is rounded as one minus a number near one, by up to 1e-4 of it at each step.
    check(Tensorwise(controller), ours, numbers, case, 1e-6 if "default" in case else 3e-5)


def test_rnn_mlp_takes_the_recorded_steps(golden):
    numbers = load(golden / "nn_adam_rnn_mlp.npz")
    theta = below(numbers, "rnn_mlp_small/theta/")
    down, across = (layer(theta, f"rnn_to_{n}_params/rnn_to_{n}") for n in ("ff", "in"))
    layers = [layer(theta, f"ffmod_params/mlp.linear_{i}") for i in range(3)]
    ours = {
        "network": cell(theta) | {"down": down, "across": across},
        "up": theta["initial_from_mlp"],
        "across": theta["initial_from_lstm"],
        "clip": (),
        "rule": {f"{n}{i}": layers[i][n] for i in range(3) for n in "wb"},
    }
    learned = Tensorwise(Hierarchical((8, 8), 6, 4, 5, 3, 0.1, 0.1))
    check(learned, ours, numbers, "rnn_mlp_small", 1e-5)


@pytest.mark.parametrize(
    ("learned", "count"),
    [
        (lopt.nn_adam(), 6856),
        (lopt.rnn_mlp(), 35799),
        (lopt.hierarchical(), 35833),
        (lopt.nominal_mlp(), 207),
        (lopt.celo2(), 347),
        (lopt.velo(), 2320385 - 31 * 512),
        (lopt.velo_small(), 13473),
    ],
)
def test_numbers_of_weights(learned, count):
    assert (
        sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(learned.init, KEY))) == count
    )


def some(seed, shapes, scale=1.0):
    generator = np.random.default_rng(seed)
    return {n: jnp.asarray(scale * generator.normal(size=s)) for n, s in shapes.items()}


# ---------------------------------------------------------------------------------------------
# VeLO: a slow twin, written from the formulas for one tensor after another
# ---------------------------------------------------------------------------------------------


def published_velo(hidden, bank, seed=0):
    """Returns random weights in the layout that was published, first mixing layer included."""
    generator, shapes = np.random.default_rng(seed), {"rnn/linear": (2 * hidden, 4 * hidden)}
    shapes |= dict.fromkeys(("linear", "linear_1", "linear_2"), (30, hidden))
    shapes |= {"rnn_to_controls": (hidden, bank), "step_size": (hidden, 1)}
    arrays = {f"rnn_params/{n}/w": generator.normal(size=s) / 4 for n, s in shapes.items()}
    arrays |= {f"rnn_params/{n}/b": generator.normal(size=s[1]) / 4 for n, s in shapes.items()}
    for n in ("hidden", "cell"):
        arrays[f"lstm_init_state/{n}"] = generator.normal(size=(1, hidden))
    groups = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
    sizes = {f"w0__{i}": (size, 4) for i, size in enumerate(groups)}
    sizes |= {"b0": (4,), "w1": (4, 4), "b1": (4,), "w2": (4, 3), "b2": (3,)}
    for n, s in sizes.items():
        arrays[f"ff_mod_stack/~/{n}"] = generator.normal(size=(bank, *s)) / 4
    return {n: array.astype(np.float32) for n, array in arrays.items()}


def clip_log(x):
    return np.clip(np.log(1e-8 + np.abs(10 * x)), -5, 5) / 2


class VeLOTwin:
    """VeLO in NumPy."""

    def __init__(self, theta, params, num_steps):
        self.theta = {n: a.astype(float) for n, a in theta.items()}
        self.params, self.num_steps, self.step = params, num_steps, 0
        state = [self.theta[f"lstm_init_state/{n}"][0] for n in ("hidden", "cell")]
        self.memory = {n: list(state) for n in params}
        self.m = {n: [np.zeros(p.shape)] * 3 for n, p in params.items()}
        self.v = {n: np.zeros(p.shape) for n, p in params.items()}
        self.rows, self.cols = {n: [0.0] * 3 for n in params}, {n: [0.0] * 3 for n in params}
        self.decays = np.exp(-1 / np.logspace(1, np.log10(num_steps), 10))
        self.means, self.lowest = np.zeros(10), np.full(10, 1e12)

    def linear(self, name, x):
        return x @ self.theta[f"rnn_params/{name}/w"] + self.theta[f"rnn_params/{name}/b"]

    def losses(self, loss):
        weight = 1 - self.decays ** (self.step + 1)
        most = loss if self.step == 0 else np.max(self.means / weight)
        self.means = self.decays * self.means + (1 - self.decays) * min(loss, 2 * abs(most))
        mean = self.means / weight
        self.lowest = np.minimum(self.lowest, mean)
        span = np.maximum(1e-8, mean[1:] - self.lowest[:-1])
        features = np.clip((mean[:-1] - self.lowest[:-1]) / span - 1, -1, 1)
        return features * (self.step + 1 > 2)

    def summary(self, name, losses):
        p = self.params[name]
        scale = 1 / np.sqrt(max(1e-9, np.mean(p**2)))
        m, v = [scale * m for m in self.m[name]], scale * self.v[name]
        offsets = np.array([0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0, 1.1])
        time = np.tanh(10 * (self.step / self.num_steps - offsets))
        rank = np.eye(5)[sum(size > 1 for size in p.shape)]
        about = [np.mean((v - np.mean(one)) ** 2) for one in m]  # about the means of momenta
        spread = [clip_log(np.var(one)) for one in m]
        return [*time, *losses, clip_log(np.mean(v)), *rank, *spread, *clip_log(np.array(about))]

    def update(self, grads, loss):
        losses = self.losses(loss)
        inputs = {n: np.array(self.summary(n, losses)) for n in self.params}
        mixed = np.max([np.maximum(0, self.linear("linear_1", x)) for x in inputs.values()], 0)
        updates = {}
        for n, x in inputs.items():
            hidden, cell = self.memory[n]
            x = self.linear("linear_2", x) + mixed
            i, g, f, o = np.split(self.linear("rnn/linear", np.concatenate([x, hidden])), 4)
            cell = cell / (1 + np.exp(-f - 1)) + np.tanh(g) / (1 + np.exp(-i))
            hidden = np.tanh(cell) / (1 + np.exp(-o))
            self.memory[n] = [hidden, cell]
            mixture, size = self.linear("rnn_to_controls", hidden), self.linear("step_size", hidden)
            weights = {
                k.removeprefix("ff_mod_stack/~/"): 100 * np.mean(a.T * mixture, -1).T
                for k, a in self.theta.items()
                if k.startswith("ff_mod")
            }
            d, m, _ = self.perceptron(weights, self.features(n, np.asarray(grads[n])))
            norm = np.sqrt(np.mean(self.params[n] ** 2) + 1e-9)
            updates[n] = -0.001 * size * norm * d * np.exp(0.001 * m)
        self.step += 1
        return updates

    def features(self, n, g):
        decays, p, q = (0.9, 0.99, 0.999), self.params[n], g**2 + 1e-30
        self.m[n] = [b * m + (1 - b) * g for b, m in zip(decays, self.m[n], strict=True)]
        self.v[n] = 0.999 * self.v[n] + 0.001 * g**2
        root, rows, cols, y, moved = 1 / np.sqrt(self.v[n] + 1e-6), [], [], [], []
        order = np.argsort(g.shape, kind="stable")
        for k, b in enumerate(decays):
            if g.ndim < 2:
                self.rows[n][k] = v = b * self.rows[n][k] + (1 - b) * q
                row = col = v
                y.append(g / np.sqrt(np.maximum(1e-9, v + 1e-9)))
                moved.append(self.m[n][k] / np.sqrt(v))
            else:
                d1, d0 = order[-2], order[-1]
                self.rows[n][k] = b * self.rows[n][k] + (1 - b) * q.mean(d0, keepdims=True)
                self.cols[n][k] = b * self.cols[n][k] + (1 - b) * q.mean(d1, keepdims=True)
                row, col = self.rows[n][k], self.cols[n][k]
                relative = row / (row.mean(d1, keepdims=True) + 1e-9)
                factor = 1 / np.sqrt(np.maximum(relative, 1e-9) * np.maximum(col, 1e-9))
                y.append(g * factor)
                moved.append(self.m[n][k] * factor)
            rows.append(row + np.zeros(g.shape))
            cols.append(col + np.zeros(g.shape))
        m, roots = self.m[n], lambda banks: [1 / np.sqrt(bank + 1e-8) for bank in banks]
        scaled = [one * root for one in m]
        columns = [g, np.clip(g, -0.1, 0.1), p, *m, self.v[n], *scaled, root, *y, g * root]
        columns += [*rows, *cols, *roots(rows), *roots(cols), *moved]
        return [c / np.sqrt(1e-5 + np.mean(c**2)) for c in columns]

    @staticmethod
    def perceptron(weights, columns):
        first = np.concatenate([weights[f"w0__{i}"] for i in range(14)])
        net = np.maximum(0, np.stack(columns, -1) @ first + weights["b0"])
        net = np.maximum(0, net @ weights["w1"] + weights["b1"])
        return np.moveaxis(net @ weights["w2"] + weights["b2"], -1, 0)


SHAPES = {"a": (3, 4), "b": (4,), "c": (3, 4), "d": (), "e": (3, 1, 2, 2), "large": (182, 181)}


def test_velo_is_its_slow_twin(tmp_path):
    msgpack, theta = pytest.importorskip("msgpack"), published_velo(3, 2)
    tree = {"ff_mod_stack": {"~": {}}, "lstm_init_state": {}, "rnn_params": {}}
    for name, a in theta.items():
        numbers = msgpack.packb((a.shape, a.dtype.name, a.tobytes()))
        first, rest = name.split("/", 1)
        branch, leaf = rest.rsplit("/", 1) if "/" in rest else ("", rest)
        (tree[first].setdefault(branch, {}) if branch else tree[first])[leaf] = msgpack.ExtType(
            1, numbers
        )
    (tmp_path / "theta.state").write_bytes(msgpack.packb(tree))
    learned, ours = lopt.load_published(tmp_path / "theta.state")
    assert learned == Tensorwise(VeLO(3, 2))
    ours = jax.tree.map(lambda leaf: leaf.astype(float), ours)
    params = some(0, SHAPES, 0.3)
    state, twin = learned.begin(ours, params, 40), VeLOTwin(theta, params, 40)
    update = jax.jit(learned.update)
    for step in range(5):
        grads = some(step + 1, SHAPES)
        loss = 3.0 / (step + 1)
        updates, state = update(ours, grads, state, params, value=jnp.asarray(loss))
        expected = twin.update(grads, loss)
        for name, own in updates.items():
            np.testing.assert_allclose(own, expected[name], rtol=1e-6, atol=1e-9, err_msg=name)
        params = twin.params = optax.apply_updates(params, updates)


# ---------------------------------------------------------------------------------------------
# Invariants and closed forms
# ---------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def step(learned, theta, params, grads):
    """Takes one step of a run of 10."""
    state = learned.begin(theta, params, 10)
    return learned.update(theta, grads, state, params, value=jnp.asarray(1.0, float))


def weights(learned):
    return jax.jit(learned.init)(KEY)


@pytest.mark.slow
def test_tensors_may_come_in_any_order_and_lack_a_gradient():
    learned = Tensorwise(VeLO(3, 2))
    theta = weights(learned)
    shapes = {"a": (3, 2), "b": (2,), "c": (3, 2)}
    params, grads = some(0, shapes), some(1, shapes)
    run = functools.partial(step, learned, theta)
    updates, state = run(params, grads)
    other = {"a": "c", "b": "b", "c": "a"}
    turned, _ = run(*({other[n]: x for n, x in tree.items()} for tree in (params, grads)))
    for name in shapes:
        np.testing.assert_allclose(turned[other[name]], updates[name], rtol=1e-9)
    optimizer = learned.optimizer(theta, 10)
    begun = optimizer.init(params)
    value = jnp.asarray(1.0, float)
    frozen, kept = optimizer.update(grads | {"b": None}, begun, params, value=value)
    alone, _ = run(*({n: tree[n] for n in "ac"} for tree in (params, grads)))
    assert frozen["b"] is None
    np.testing.assert_allclose(frozen["a"], alone["a"], rtol=1e-9)
    np.testing.assert_array_equal(kept.own.momentum["b"], jnp.zeros((3, 2)))
    assert jax.tree.structure(kept) == jax.tree.structure(state)


def test_half_precision_is_only_at_the_border():
    learned = lopt.nn_adam(0.1, hidden=2)
    params = {"a": jnp.ones((2, 2), jnp.bfloat16), "b": jnp.ones((2, 2), jnp.float32)}
    updates, state = step(learned, weights(learned), params, params)
    assert [updates[n].dtype for n in "ab"] == [jnp.bfloat16, jnp.float32]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} == {"float32", "int32"}
    np.testing.assert_allclose(updates["a"].astype(float), updates["b"], rtol=1e-2)


def test_the_last_validation_loss_counts_once():
    controller = Hierarchical((2,), 2, 1, 1, 1)
    theta = jax.jit(controller.init)(KEY)
    state = controller.start(theta, None, float)
    grads, losses = [jnp.ones(3)], [(1.0, None), (1.0, 2.0), (1.0, 2.0), (1.0, 4.0)]
    found = []
    for i, pair in enumerate(losses):
        extra = dict(zip(("value", "validation_loss"), pair, strict=True))
        told, state = controller.prepare(theta, grads, state, jnp.asarray(i, jnp.int32), extra)
        found.append((float(state.measured), float(state.validation)))
    np.testing.assert_allclose(found, [(0, 0), (1, 0.1), (1, 0.1), (2, 0.295)])
    # The average of equal losses is that loss, which deviates by nothing.
    np.testing.assert_allclose(told["losses"][0], 0, atol=1e-6)


def test_the_past_parameter_is_that_of_the_last_hundredth_step():
    learned = Tensorwise(Hierarchical((2,), 2, 1, 1, 1, past=True))
    theta, params, update = weights(learned), {"w": jnp.ones(3)}, jax.jit(learned.update)
    state, found = learned.begin(theta, params), []
    for count in (1, 100, 101):
        state = eqx.tree_at(lambda s: s.step, state, jnp.asarray(count, jnp.int32))
        now = {"w": jnp.full(3, float(count))}
        updates, state = update(theta, params, state, now, value=jnp.asarray(1.0, float))
        found.append((float(updates["w"][0]), float(state.own[3]["w"][0])))
    assert [old for _, old in found] == [1, 100, 100]
    # It is read, before it is renewed.
    older = eqx.tree_at(lambda s: s.own[3]["w"], state, -jnp.arange(3.0))
    changed, _ = update(theta, params, older, now, value=jnp.asarray(1.0, float))
    kept, _ = update(theta, params, state, now, value=jnp.asarray(1.0, float))
    assert jnp.abs(changed["w"] - kept["w"]).max() > 0


@pytest.mark.parametrize(
    "learned", [lopt.nn_adam(hidden=2), lopt.velo(3, 2), Guided(lopt.LearnableSGD(), optax.sgd(1))]
)
def test_a_first_state_can_be_donated(learned):
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    theta = eqx.filter_jit(learned.init)(KEY)
    leaves = jax.tree.leaves((theta, params, learned.optimizer(theta, 9).init(params)))
    places = [leaf.unsafe_buffer_pointer() for leaf in leaves]
    assert len(set(places)) == len(places)


def test_the_nominal_term_is_added_to_the_adafactor_rule():
    plain, shapes = lopt.adafactor_mlp(), {"w": (3, 2), "b": (2,)}
    learned = lopt.nominal_mlp(0.3, 0.2, "adam_aggmo", controls_decay=True)
    theta = weights(learned)
    rule = theta["rule"] | {n: theta["rule"][n][:2] for n in ("w2", "b2")}
    # The last output is a constant: decay by 0.2 exp(0.001 * 500).
    last = theta["rule"]["b2"].at[3].set(500.0)
    own = theta["rule"] | {"w2": theta["rule"]["w2"].at[3].set(0.0), "b2": last}
    params, grads = some(0, shapes), some(1, shapes)
    updates, state = step(learned, theta | {"rule": own}, params, grads)
    expected, _ = step(plain, theta | {"rule": rule}, params, grads)
    for n, p in params.items():
        m, v = state.features.momentum[n], state.features.rms[n]
        nominal = 0.3 * np.exp(0.001) * np.mean(m / np.sqrt(v + 1e-6), 0)
        decay = 0.2 * np.exp(0.5) * p
        np.testing.assert_allclose(updates[n], expected[n] - nominal - decay, rtol=1e-9)


@pytest.mark.standard_promotion
def test_vectors_of_celo2_are_stepped_by_adam():
    learned = lopt.celo2(vector_multiplier=20.0)
    theta, shapes = weights(learned), {"w": (3, 2), "b": (2,)}
    params, adam = some(0, shapes), optax.scale_by_adam(0.9, 0.95)
    state, other = learned.begin(theta, params), adam.init(params)
    update = jax.jit(learned.update)
    for i in range(2):
        grads = some(i + 1, shapes)
        updates, state = update(theta, grads, state, params)
        expected, other = adam.update(grads, other)
        np.testing.assert_allclose(updates["b"], -0.02 * expected["b"], rtol=1e-6)
        # Directions of matrices have unit root mean square.
        np.testing.assert_allclose(jnp.mean(updates["w"] ** 2), 1e-6, rtol=1e-6)


def test_celo2_points_uphill_for_optax():
    shapes = {"w": (3, 2)}
    params, grads = some(0, shapes), some(1, shapes)
    down, up = lopt.celo2(), lopt.celo2(step_multiplier=-1.0)
    theta = weights(down)
    chain = optax.chain(
        up.optimizer(theta), optax.add_decayed_weights(0.5), optax.scale_by_learning_rate(0.001)
    )
    updates, _ = chain.update(grads, chain.init(params), params)
    expected, _ = step(down, theta, params, grads)
    np.testing.assert_allclose(updates["w"], expected["w"] - 0.0005 * params["w"], rtol=1e-9)


@pytest.mark.parametrize(("bias", "factor"), [(2.0, 2.0), (-1.0, 1e-5), (1e6, 1000.0)])
def test_sinv6_is_relative_and_its_schedule_is_clipped(bias, factor):
    learned = lopt.sinv6(hidden=2)
    theta = jax.tree.map(jnp.zeros_like, weights(learned))
    theta["schedule"]["step"]["b"] = jnp.full(1, bias)
    params, grads = {"w": jnp.full(3, -2.0)}, {"w": jnp.array([1.0, -3.0, 2000.0])}
    updates, _ = step(learned, theta, params, grads)
    clipped = np.array([1.0, -3.0, 1000.0])
    direction = 0.1 * clipped / (np.sqrt(0.001 * clipped**2 + 1e-10) + 1e-8)
    np.testing.assert_allclose(updates["w"], -0.002 * factor * direction, rtol=1e-6)


def test_multipliers_for_widths():
    def network(width):
        shapes = {"first": (5, width), "hidden": (width, width), "last": (width, 3)}
        return some(0, shapes | {"bias": (width,), "kernel": (3, 3, width, 2 * width)})

    wide, narrow = network(8), network(2)
    multipliers = lopt.learned.width_multipliers(wide, narrow)
    expected = {"bias": 1.0, "first": 1.0, "hidden": 0.25, "kernel": 0.25, "last": 0.25}
    assert dict(multipliers.values) == expected
    kept = lopt.learned.width_multipliers(wide, narrow, outputs=False)
    assert dict(kept.values) == expected | {"last": 1.0}
    # In PyTorch's order, where shapes do not tell an embedding from an output.
    shapes = [{"w": (3, n), "k": (2 * n, n, 3, 3), "embedding": (5, n)} for n in (8, 2)]
    networks = [{n: jnp.ones(s) for n, s in one.items()} for one in shapes]
    turned = lopt.learned.width_multipliers(*networks, lopt.learned.MatrixAxes("out_in"))
    assert dict(turned.values) == {"w": 0.25, "k": 0.25, "embedding": 1.0}
    scale = lopt.learned.scale_by_width(multipliers)
    updates, _ = scale.update(wide, scale.init(wide))
    for name, update in updates.items():
        np.testing.assert_allclose(update, expected[name] * wide[name], rtol=1e-12)
    with pytest.raises(ValueError, match="has none for other, only for bias, first"):
        scale.init({"other": jnp.ones(2)})


BAD = {
    "weights of another design": (
        lambda: lopt.small_mlp().optimizer(weights(lopt.adafactor_mlp())),
        r"theta\['features'\]\['adafactor_decays'\] has the shape \(3,\), expected None",
    ),
    "weights of another size": (
        lambda: lopt.celo(8).optimizer(weights(lopt.celo(4)), 10),
        r"\['schedule'\]\['cell'\]\['b'\] has the shape \(16,\), expected \(32,\); lopt.load",
    ),
    "no steps": (
        lambda: lopt.celo(4).optimizer(weights(lopt.celo(4)), 0),
        r"LearnedSchedule.optimizer\(num_steps=0\) must be a positive integer",
    ),
    "no length": (lambda: lopt.velo_small().optimizer({}), "Tensorwise.*needs the length"),
    "no length of Celo": (lambda: lopt.celo().optimizer({}), "LearnedSchedule.*needs the length"),
    "rank": (
        lambda: VeLO().begin((), jnp.ones((2,) * 5)),
        r"shape \(2, 2, 2, 2, 2\), but knows at most four axes longer than 1",
    ),
    "rank of summaries": (
        lambda: Hierarchical().begin((), jnp.ones((1,) * 5)),
        "at most four axes; reshape",
    ),
    "bank": (lambda: lopt.velo(2, 0), "VeLO.bank=0. must be a positive"),
    "factor": (lambda: lopt.learned.LearnedSchedule(lopt.celo2(), factor="log"), '"exp" or "clip"'),
    "estimate": (lambda: lopt.nominal_mlp(estimate="sgd"), "estimate='sgd'.*adam_aggmo"),
    "plain": (
        lambda: lopt.learned.Normalised(lopt.learned.MomentumFeatures(), ("speed",)),
        "has speed, but the columns are gradient",
    ),
    "two networks": (
        lambda: lopt.learned.width_multipliers({"a": jnp.ones(2)}, {"b": jnp.ones(2)}),
        "one network at two widths, but their tensors are a, and b",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_it_has_one_clear_error(name):
    make, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=f"(?s){message}|Type-check"):
        make()


@pytest.mark.parametrize("learned", [lopt.celo(2), Tensorwise(VeLO(2, 2)), lopt.rnn_mlp()])
def test_a_missing_loss_is_refused(learned):
    params = {"w": jnp.ones(2)}

    def update(key):
        theta = learned.init(key)
        return learned.update(theta, params, learned.begin(theta, params, 10), params)

    with pytest.raises(ValueError, match="needs the training loss; try"):
        jax.eval_shape(update, KEY)
