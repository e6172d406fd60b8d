"""Published weights: what is read, and what is refused."""

import re

import jax
import msgpack
import numpy as np
import pytest

import lopt


def packed(array, code=1, dtype=None):
    content = msgpack.packb((array.shape, dtype or array.dtype.name, array.tobytes()))
    return msgpack.ExtType(code, content)


def celo2(**changes):
    """Returns the arrays of a file of Celo2, of width 2, with some of them changed."""
    groups = (1, 1, 1, 3, 1, 3, 1, 3, 1, 3, 3, 3, 3, 3)
    shapes = {f"w0__{i}": (size, 2) for i, size in enumerate(groups)}
    shapes |= {"b0": (2,), "w1": (2, 2), "b1": (2,), "w2": (2, 3), "b2": (3,)}
    arrays = {name: np.full(shape, 0.5, np.float32) for name, shape in shapes.items()} | changes
    return {f"ff_mod_stack/~/{name}": array for name, array in arrays.items() if array is not None}


def schedule(hidden=2, inputs=18):
    """Returns the arrays of a file of Celo-Adam or Sinv6."""
    shapes = {"linear": inputs, "linear_1": inputs, "linear_2": inputs}
    arrays = {f"rnn_params/{n}": (rows, hidden) for n, rows in shapes.items()}
    arrays |= {
        "rnn_params/rnn/linear": (2 * hidden, 4 * hidden),
        "rnn_params/step_size": (hidden, 1),
    }
    found = {f"{n}/w": np.ones(shape, np.float32) for n, shape in arrays.items()}
    found |= {f"{n}/b": np.ones(shape[1], np.float32) for n, shape in arrays.items()}
    return found | {f"lstm_init_state/{n}": np.ones((1, hidden)) for n in ("hidden", "cell")}


def test_both_formats_are_read(tmp_path):
    arrays = {name.rpartition("/")[2]: array for name, array in celo2().items()}
    tree = {"ff_mod_stack": {"~": {name: packed(array) for name, array in arrays.items()}}}
    (tmp_path / "theta.state").write_bytes(msgpack.packb(tree))
    np.savez(tmp_path / "weights.npz", **celo2())
    first, second = (lopt.load_published(tmp_path / n) for n in ("theta.state", "weights.npz"))
    assert first[0] == second[0] == lopt.learned.Celo2((2, 2))
    jax.tree.map(np.testing.assert_array_equal, first[1], second[1])


def test_files_that_are_alike_need_the_name_of_the_design(tmp_path):
    np.savez(tmp_path / "weights.npz", **schedule())
    with pytest.raises(ValueError, match="fits celo_adam and sinv6, whose files are alike; say"):
        lopt.load_published(tmp_path / "weights.npz")
    learned, theta = lopt.load_published(tmp_path / "weights.npz", "sinv6")
    assert learned == lopt.sinv6(2)
    # Gates are in our order, and the forget gate has the one that is added there.
    np.testing.assert_array_equal(theta["schedule"]["cell"]["b"], [1, 1, 2, 2, 1, 1, 1, 1])


BAD = {
    "none": ({}, None, "has no weights of celo2, .* or velo, but 0 arrays"),
    "lacking": (celo2(w1=None), None, r"but 18 arrays: ff_mod_stack/~/b0 \[2\], .*, \.\.\."),
    "another": (celo2(), "celo", "has no weights of celo, but celo2: ff_mod_stack"),
    "inputs": (schedule(inputs=30), "sinv6", "has no weights of sinv6, but 12 arrays"),
    "size": (
        celo2(w1=np.ones((3, 2))),
        None,
        r"weights \['rule'\]\['w1'\] of celo2 .* of shape \(2, 3\)",
    ),
    "groups": (
        celo2(w0__0=np.ones((2, 2))),
        None,
        r"\['w0'\] of celo2 that are of shape \(2, 31\)",
    ),
    "finite": (celo2(b1=np.full(2, np.nan)), None, "'b1'.* that are not finite; they must"),
    "integers": (celo2(b1=np.ones(2, int)), None, "neither Flax's .*b1 is no array of floats"),
    "objects": (celo2(b1=np.array([None])), None, "Object arrays cannot be loaded"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_of_something_else_has_one_clear_error(tmp_path, name):
    arrays, design, message = BAD[name]
    np.savez(tmp_path / "weights.npz", allow_pickle=True, **arrays)
    with pytest.raises(ValueError, match=f"weights.npz.*{message}"):
        lopt.load_published(tmp_path / "weights.npz", design)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04 but no archive",
        b"weights",
        msgpack.packb({"a": packed(np.ones(2), code=2)}),
        msgpack.packb({"a": packed(np.ones(2), dtype="object")}),
        msgpack.packb({"a": packed(np.ones(2), dtype="float32")})[:-3],
        msgpack.packb([1.0]),
    ],
)
def test_damaged_files_have_one_clear_error(tmp_path, content):
    (tmp_path / "theta.state").write_bytes(content)
    message = re.escape(str(tmp_path / "theta.state"))
    with pytest.raises(ValueError, match=f"^{message} (is neither Flax's|has no weights of)"):
        lopt.load_published(tmp_path / "theta.state")


def test_there_must_be_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"No such file.*theta\.state"):
        lopt.load_published(tmp_path / "theta.state")
