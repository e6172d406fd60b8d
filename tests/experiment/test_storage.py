import functools
import json

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import lopt
from lopt.experiment.runs import description, storage
from lopt.experiment.runs.description import describe, restore

OPTIMIZERS = {
    "small_mlp": lambda: lopt.small_mlp((3, 4)),
    "adafactor_mlp": lambda: lopt.adafactor_mlp(momentum_decays=(0.5,), adafactor_decays=(0.8,)),
    "LearnableAdam": lopt.LearnableAdam,
    "momentum": lambda: lopt.learnable(
        functools.partial(optax.sgd, nesterov=True), learning_rate=0.1, momentum=0.9
    ),
    "inverse time": lopt.inverse_time_momentum,
    "celo": lambda: lopt.celo(3),
    "celo_adam": lambda: lopt.celo_adam(3),
    "celo2": lambda: lopt.celo2(vector_multiplier=20.0),
    "hierarchical": lopt.hierarchical,
    "nn_adam": lopt.nn_adam,
    "nominal_mlp": lambda: lopt.nominal_mlp(0.1, estimate="adam"),
    "rnn_mlp": lopt.rnn_mlp,
    "sinv6": lambda: lopt.sinv6(3),
    "velo_small": lopt.velo_small,
    "schedules": lambda: lopt.learnable(
        optax.sgd,
        learning_rate=lopt.learned.Cosine(0.1, 50),
        momentum=lopt.learned.PerStep(0.9, length=3),
    ),
    "per tensor": lambda: lopt.learnable(
        optax.adam, learning_rate=lopt.learned.per_tensor({"w": 0.1, "b": 0.01})
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_round_trip(name, key, tmp_path):
    learned = OPTIMIZERS[name]()
    theta = learned.init(key)
    lopt.save(tmp_path / "weights.safetensors", learned, theta)
    again, weights = lopt.load(tmp_path)
    assert jax.tree.structure(weights) == jax.tree.structure(theta)
    jax.tree.map(np.testing.assert_array_equal, weights, theta)
    # The partial of the last is equal in all that matters, but Python compares partials by name.
    assert describe(again) == describe(learned)
    assert json.loads(json.dumps(describe(learned))) == describe(learned)


def test_arrays_that_are_not_contiguous_survive(tmp_path):
    """safetensors 0.8.0 scrambles them if it is given them as they are."""
    array = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    storage.save_checkpoint(tmp_path, 1, {"a": array, "b": array.T, "c": array[:, ::2]})
    like = {"a": np.zeros((2, 3)), "b": np.zeros((3, 2)), "c": np.zeros((2, 2))}
    loaded = storage.load_checkpoint(tmp_path, 1, like)
    np.testing.assert_array_equal(loaded["a"], array)
    np.testing.assert_array_equal(loaded["b"], array.T)
    np.testing.assert_array_equal(loaded["c"], array[:, ::2])


def test_keys_and_integers_survive(key, tmp_path):
    state = {"key": key, "many": jax.random.split(key, 3), "step": jnp.asarray(7, jnp.int32)}
    storage.save_checkpoint(tmp_path, 3, state)
    loaded = storage.load_checkpoint(tmp_path, 3, jax.eval_shape(lambda: state))
    assert jax.random.normal(loaded["key"]) == jax.random.normal(key)
    assert loaded["many"].shape == (3,)
    assert loaded["step"].dtype == jnp.int32


class TestDamage:
    @pytest.fixture
    def path(self, key, tmp_path):
        learned = lopt.small_mlp((3,))
        lopt.save(tmp_path / "weights.safetensors", learned, learned.init(key))
        return tmp_path / "weights.safetensors"

    def rewrite(self, path, change=lambda arrays: arrays, metadata=None):
        with safetensors.safe_open(path, "numpy") as file:
            description = json.loads(file.metadata()["lopt"])
        del description["checksum"]
        kept = {"lopt": json.dumps(description)}
        arrays = change(safetensors.numpy.load_file(path))
        path.write_bytes(safetensors.numpy.save(arrays, kept if metadata is None else metadata))

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing"):
            lopt.load(tmp_path / "nothing")

    @pytest.mark.parametrize("length", [0, 5, 100, -3])
    def test_truncated(self, path, length):
        path.write_bytes(path.read_bytes()[:length])
        with pytest.raises(ValueError, match=r"weights\.safetensors is not a whole"):
            lopt.load(path)

    def test_a_pickle(self, path):
        path.write_bytes(b"\x80\x04\x95" + b"." * 200)
        with pytest.raises(ValueError, match="not a whole"):
            lopt.load(path)

    def test_of_another_shape(self, path):
        self.rewrite(path, lambda arrays: arrays | {"['rule']['b0']": np.zeros(7)})
        with pytest.raises(ValueError, match=r"\['rule'\]\['b0'\] is .*7.*expected .*3"):
            lopt.load(path)

    def test_incomplete(self, path):
        self.rewrite(path, lambda arrays: {"['rule']['b0']": arrays["['rule']['b0']"]})
        with pytest.raises(ValueError, match="lacks"):
            lopt.load(path)

    def test_without_a_description(self, path):
        self.rewrite(path, metadata={})
        with pytest.raises(ValueError, match="describes no optimizer"):
            lopt.load(path)

    @pytest.mark.parametrize(
        "description",
        [
            {"class": "Popen", "fields": {}},
            {"class": "MLP", "fields": {"inputs": 3, "unknown": 1}},
            {"function": "os.system"},
            {"function": "optax._src"},
            {"function": "jax.nn.nothing"},
            {"other": 1},
            [1, 2],
        ],
    )
    def test_that_names_something_else(self, path, description):
        self.rewrite(path, metadata={"lopt": json.dumps(description)})
        with pytest.raises(ValueError, match=r"(?i)no class|not? (fit|a )|no function"):
            lopt.load(path)


@pytest.mark.parametrize("byte", [-1, -9, -40])
def test_weights_with_a_flipped_bit_are_refused(byte, key, tmp_path):
    learned = lopt.small_mlp((3,))
    path = tmp_path / "weights.safetensors"
    lopt.save(path, learned, learned.init(key))
    content = bytearray(path.read_bytes())
    content[byte] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: its checksum"):
        lopt.load(path)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_weights_that_are_not_finite_are_refused(value, tmp_path):
    learned = lopt.LearnableSGD()
    path = tmp_path / "weights.safetensors"
    lopt.save(path, learned, {"learning_rate": jnp.asarray(value)})
    with pytest.raises(ValueError, match=r"not finite, in .*learning_rate"):
        lopt.load(path)


def test_only_parts_of_lopt_can_be_described():
    with pytest.raises(TypeError, match="cannot be saved"):
        describe(lopt.learnable(lambda learning_rate: optax.sgd(learning_rate), learning_rate=0.1))
    assert restore(describe((1, "a", None, 2.5))) == (1, "a", None, 2.5)


class Halved(eqx.Module):
    """A scale of one's own."""

    by: float = 2.0

    def __call__(self, outputs):
        return outputs[0] / self.by


def own_sgd(learning_rate):
    return optax.sgd(2 * learning_rate)


def test_what_is_registered_is_saved_and_what_is_not_is_never_found(key, tmp_path, monkeypatch):
    monkeypatch.setattr(description, "_REGISTERED", {})
    path, features = tmp_path / "weights.safetensors", lopt.learned.MomentumFeatures((0.9,))
    rule = lopt.learned.MLP(len(features.names()), (2,), 1)
    learned = lopt.learned.Nominal(
        lopt.Coordinatewise(features, rule, Halved(4.0)),
        lopt.learnable(own_sgd, learning_rate=0.1),
    )
    theta = learned.init(key)
    for own in (Halved, own_sgd):
        with pytest.raises(TypeError, match=r"cannot be saved.*lopt\.register"):
            lopt.save(path, learned, theta)
        assert lopt.register(own) is own
        assert lopt.register(own) is own  # as a cell of a notebook that is run again does
    lopt.save(path, learned, theta)
    again, weights = lopt.load(path)
    assert again == learned
    jax.tree.map(np.testing.assert_array_equal, weights, theta)
    params = {"w": jnp.ones(2)}
    optimizer = lopt.load_optimizer(path)
    ours = optimizer.update(params, optimizer.init(params), params)[0]["w"]
    theirs = learned.update(theta, params, learned.begin(theta, params), params)[0]["w"]
    np.testing.assert_array_equal(ours, theirs)
    for name in ("Halved", "own_sgd"):
        monkeypatch.delitem(description._REGISTERED, name)
        with pytest.raises(ValueError, match=f"there is no .* '{name}'; import what registers it"):
            lopt.load(path)
        lopt.register(globals()[name])


def test_names_are_registered_once(monkeypatch):
    monkeypatch.setattr(description, "_REGISTERED", {})
    lopt.register(own_sgd)
    with pytest.raises(ValueError, match=r"register\(own_sgd\): something else has this name"):
        lopt.register(type("own_sgd", (Halved,), {}))
    with pytest.raises(ValueError, match=r"register\(MLP\): something else"):
        lopt.register(type("MLP", (Halved,), {}))


def test_weights_saved_in_double_precision_load_in_single(key, tmp_path):
    learned = lopt.LearnableSGD()
    lopt.save(tmp_path / "w.safetensors", learned, learned.init(key))
    with jax.enable_x64(False):
        _, theta = lopt.load(tmp_path / "w.safetensors")
    assert theta["learning_rate"].dtype == jnp.float32
