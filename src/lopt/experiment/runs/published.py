"""Published weights of other libraries: Flax's MessagePack and NumPy's archives, never executed."""

import functools
import io
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import msgpack
import numpy as np

from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Theta
from lopt.experiment.runs.files import one_line
from lopt.learned import Celo2, Tensorwise, VeLO, celo, celo_adam, sinv6

Arrays = dict[str, np.ndarray]

_PERCEPTRON = {f"ff_mod_stack/~/{n}" for n in ("b0", "b1", "b2", "w1", "w2")}
_PERCEPTRON |= {f"ff_mod_stack/~/w0__{group}" for group in range(14)}
_LAYERS = ("linear", "linear_1", "linear_2", "rnn/linear", "step_size")
_SCHEDULE = {f"rnn_params/{layer}/{n}" for layer in _LAYERS for n in "bw"}
_SCHEDULE |= {"lstm_init_state/hidden", "lstm_init_state/cell"}
_MIXTURE = {f"rnn_params/rnn_to_controls/{n}" for n in "bw"}


def load_published(
    path: str | Path, design: str | None = None
) -> tuple[AbstractLearnedOptimizer, Theta]:
    """Returns the learned optimizer and published weights of Celo2, Celo, Celo-Adam, Sinv6 or VeLO.

    Args:
        path: of a file of Flax's MessagePack (`theta.state`) or of NumPy (`.npz`).
        design: "celo_adam" or "sinv6", whose files are alike; others are seen from the file.

    Raises:
        ValueError: if the file is damaged, or does not hold the weights of (that) design.
    """
    arrays = _read(Path(path))
    fits = _designs(arrays)
    if not fits or design not in (None, *fits):
        shapes = [f"{name} {list(array.shape)}" for name, array in sorted(arrays.items())]
        raise ValueError(
            f"{path} has no weights of {design or 'celo2, celo, celo_adam, sinv6 or velo'}, but "
            f"{' or '.join(fits) or f'{len(arrays)} arrays'}: {', '.join([*shapes[:4], '...'])}"
        )
    if design is None and len(fits) > 1:
        raise ValueError(
            f"{path} fits {' and '.join(fits)}, whose files are alike; say which it is, as in "
            f'load_published(path, "{fits[0]}").'
        )
    try:
        learned, theta = _converted(arrays, design or fits[0])
    except ValueError as error:
        raise ValueError(
            f"{path} has weights of {design or fits[0]} of sizes that do not fit one another "
            f"({one_line(error)}); restore it from a copy."
        ) from error
    expected = eqx.filter_eval_shape(learned.init, jax.random.key(0))

    def checked(name: Any, like: Any, array: np.ndarray) -> Any:
        if array.shape != like.shape or not np.isfinite(array).all():
            found = f"of shape {array.shape}" if array.shape != like.shape else "not finite"
            raise ValueError(
                f"{path} has weights {jax.tree_util.keystr(name)} of {design or fits[0]} that are "
                f"{found}; they must be finite, of shape {like.shape}."
            )
        return jnp.asarray(array, like.dtype)

    return learned, jax.tree_util.tree_map_with_path(checked, expected, theta)


def _read(path: Path) -> Arrays:
    """Returns the arrays of a file by their path in it."""
    content = path.read_bytes()
    try:
        if content[:2] == b"PK":
            with np.load(io.BytesIO(content), allow_pickle=False) as file:
                arrays: Arrays = dict(file)
        else:
            leaves = jax.tree.leaves_with_path(msgpack.unpackb(content, ext_hook=_array))
            name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
            arrays = {name(path): np.asarray(leaf) for path, leaf in leaves}
        if strange := [name for name, array in arrays.items() if array.dtype.kind != "f"]:
            raise ValueError(f"{strange[0]} is no array of floats")
    except Exception as error:  # a damaged file may fail anyhow
        raise ValueError(
            f"{path} is neither Flax's MessagePack nor NumPy's .npz of floats "
            f"({one_line(error)}); restore it from a copy."
        ) from error
    return arrays


def _array(code: int, content: bytes) -> np.ndarray:
    """Reads Flax's extension type of arrays: shape, name of the dtype, and numbers."""
    shape, dtype, numbers = msgpack.unpackb(content)
    if code != 1 or dtype not in ("float16", "float32", "float64"):
        raise ValueError(f"there is something else than floats: {code}, {dtype}")
    return np.frombuffer(numbers, dtype).reshape(shape)


def _designs(arrays: Arrays) -> list[str]:
    """Returns the designs whose files have arrays of these names and numbers of inputs."""
    names, inputs = arrays.keys(), arrays.get("rnn_params/linear_1/w", np.zeros(0)).shape[:1]
    if names == _PERCEPTRON:
        return ["celo2"]
    if names == _SCHEDULE | _PERCEPTRON | _MIXTURE:
        return {(18,): ["celo"], (30,): ["velo"]}.get(inputs, [])
    return ["celo_adam", "sinv6"] if names == _SCHEDULE and inputs == (18,) else []


def _converted(arrays: Arrays, design: str) -> tuple[AbstractLearnedOptimizer, Any]:
    """Returns a design of the size of these arrays, and them as its theta."""
    if design == "celo2":
        widths = arrays["ff_mod_stack/~/b0"].size, arrays["ff_mod_stack/~/b1"].size
        return Celo2(widths), {"features": (), "rule": _perceptron(arrays)}
    hidden, network = arrays["lstm_init_state/hidden"].size, _network(arrays)
    if design == "velo":
        bank, network["mixture"] = _perceptron(arrays), _layer(arrays, "rnn_to_controls")
        return Tensorwise(VeLO(hidden, len(bank["b0"]))), {"network": network, "bank": bank}
    rule = jax.tree.map(lambda w: w[0], _perceptron(arrays)) if design == "celo" else ()
    make = {"celo": celo, "celo_adam": celo_adam, "sinv6": sinv6}[design]
    return make(hidden), {"learned": {"features": (), "rule": rule}, "schedule": network}


def _perceptron(arrays: Arrays) -> dict[str, np.ndarray]:
    """Returns the weights of one perceptron, or of a bank of them, matrices with outputs first."""
    own = {n.rpartition("/")[2]: array for n, array in arrays.items() if n in _PERCEPTRON}
    own["w0"] = np.concatenate([own.pop(f"w0__{group}") for group in range(14)], axis=-2)
    return {n: np.swapaxes(w, -1, -2) if n[0] == "w" else w for n, w in own.items()}


def _layer(arrays: Arrays, name: str) -> dict[str, np.ndarray]:
    return {"w": arrays[f"rnn_params/{name}/w"].T, "b": arrays[f"rnn_params/{name}/b"]}


def _network(arrays: Arrays) -> dict[str, Any]:
    """Returns the LSTM and its layers. The layer "linear" is of no effect in any design."""
    cell = _layer(arrays, "rnn/linear")
    # Gates there are input, cell, forget and output, and that of forget has one added.
    for n, array in cell.items():
        into, candidate, forget, out = np.split(array, 4)
        cell[n] = np.concatenate([into, forget + (n == "b"), candidate, out])
    memory = tuple(arrays[f"lstm_init_state/{n}"].reshape(-1) for n in ("hidden", "cell"))
    layers = {"mix": "linear_1", "input": "linear_2", "step": "step_size"}
    own = {name: _layer(arrays, layer) for name, layer in layers.items()}
    return own | {"cell": cell, "memory": memory}
