"""What linear layers do not pass on: early translations, and directions not seen or not reached.

Behind linear units x -> W1 x + b1 come other layers W2, W3, ... without a nonlinearity in between,
one matrix M all together. A change V of W1 and b1 does nothing if M V is zero, or, where they lead
into a softmax, if all of its rows are equal. And where the inputs are few, a change V of W2 does
nothing if V W1 is zero, but for what it makes of b1, which b2 takes up.
"""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.analysis.symmetry.builders import check_paths, layer_width
from lopt.analysis.symmetry.generators import AbstractGenerator, FreeGenerator, check_amounts
from lopt.analysis.symmetry.places import Units, array_at, leaves_by_path, with_leaves
from lopt.core.checks import check_integer
from lopt.core.types import Params, Scalar

Paths = str | tuple[str, ...]


class Blind(AbstractGenerator):
    """Moves linear units in all directions that the layers behind them make nothing of.

        xi_ij = P e_i e_j',   psi = W1 + P a,   P the projection on what M makes zero

    A unit of this symmetry is an entry of a, of which there are as many as of W1 and b1: tangents
    are not independent, but span all such directions. What gradient flow conserves is not known, as
    P moves. See `unseen`, which builds it.

    Attributes:
        name, kind, units: see `AbstractGenerator`.
        incoming: paths of arrays whose first axis counts the linear units.
        outgoing: paths of the matrices behind them, in the order in which they are applied.
    """

    name: str = eqx.field(static=True)
    kind: str = eqx.field(static=True)
    units: int = eqx.field(static=True)
    incoming: tuple[str, ...] = eqx.field(static=True)
    outgoing: tuple[str, ...] = eqx.field(static=True)

    def __check_init__(self) -> None:
        check_integer(f"Blind({self.name!r})", "units", self.units)
        sides = self.incoming, self.outgoing
        if not all(isinstance(side, tuple) and side for side in sides):
            raise ValueError(
                f"Blind({self.name!r}) must have tuples of paths on both sides; it has incoming="
                f"{self.incoming!r}, outgoing={self.outgoing!r}. Try unseen, which builds it."
            )

    def combine(self, params: Params, amounts: Units) -> Params:
        """Returns P a."""
        return with_leaves(params, self._moves(params, amounts), others=False)

    def act(self, params: Params, amounts: Units) -> Params:
        """Returns the params with P a added to what leads into the units."""
        own, moves = self._matrices(params), self._moves(params, amounts)
        leaves = leaves_by_path(params)
        return with_leaves(params, {p: leaves[p] + moves[p] for p in own}, others=True)

    def along(self, params: Params, direction: Params) -> Units:
        """Returns the entries of P times the direction."""
        towards = jnp.concatenate(list(self._matrices(direction).values()), axis=1)
        return (self._projection(params) @ towards).reshape(-1)

    def lengths(self, params: Params) -> Units:
        """Returns |P e_i| for each entry of a."""
        projection = self._projection(params)
        lengths = jnp.linalg.norm(projection, axis=0)
        return jnp.repeat(lengths, self.units // len(projection))

    def share(self, params: Params, along: Units) -> Scalar:
        """Returns the squared length of P times the direction, which lies along the tangents."""
        return jnp.sum(along**2)

    def conserved(self, params: Params) -> Units:
        """Raises an error, as what is conserved is not known.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"Blind({self.name!r}) does not know what gradient flow conserves, as the directions "
            "it moves in change with the weights behind; try generators whose knows_conserved is "
            "true."
        )

    @property
    def knows_conserved(self) -> bool:
        """It is not."""
        return False

    def _matrices(self, params: Params) -> dict[str, Float[Array, "unit _input"]]:
        owner, leaves = f"The symmetry {self.name!r}", leaves_by_path(params)
        arrays = {path: array_at(owner, leaves, path) for path in self.incoming}
        widths = {array.shape[:1] for array in arrays.values()}
        if len(widths) > 1 or sum(array.size for array in arrays.values()) != self.units:
            shapes = [array.shape for array in arrays.values()]
            raise ValueError(
                f"{owner} needs arrays with {self.units} entries, whose first axes count the same "
                f"units; those at {', '.join(self.incoming)} have shapes {shapes}. Try building "
                "the symmetry from these params."
            )
        return {path: array.reshape(len(array), -1) for path, array in arrays.items()}

    def _projection(self, params: Params) -> Float[Array, "unit unit"]:
        owner = f"The symmetry {self.name!r}"
        behind = product_of(owner, params, self.outgoing)
        width = len(next(iter(self._matrices(params).values())))
        if behind.shape[1] != width:
            raise ValueError(
                f"{owner} moves {width} units, and the weights behind them are of "
                f"{behind.shape[1]}. Try building the symmetry from these params."
            )
        return jnp.eye(behind.shape[1], dtype=behind.dtype) - _pseudo_inverse(behind) @ behind

    def _moves(self, params: Params, amounts: Units) -> dict[str, Array]:
        check_amounts(self, amounts)
        projection, leaves = self._projection(params), leaves_by_path(params)
        moves, first = {}, 0
        amounts = amounts.reshape(len(projection), -1)
        for path, matrix in self._matrices(params).items():
            part = amounts[:, first : first + matrix.shape[1]]
            moves[path] = (projection @ part).astype(matrix.dtype).reshape(leaves[path].shape)
            first += matrix.shape[1]
        return moves


def unseen(params: Params, incoming: Paths, outgoing: Paths, *, name: str | None = None) -> Blind:
    """Moves linear units in all directions that the layers behind them make nothing of.

    There are such where units are more than the smallest width behind them, and only then it is
    built.

    Args:
        params: of the network, for the shapes.
        incoming: paths of W1, and of b1 if there is one; the first axis counts the units.
        outgoing: path of W2, of shape (outputs, units), or those of several such matrices one
            behind the other, without a nonlinearity in between.
        name: by default made of the kind and the layer.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w1": jnp.ones((3, 4)), "w2": jnp.array([[1.0, 0.0, 0.0]])}
        >>> hidden = unseen(params, "['w1']", "['w2']")
        >>> hidden.units, [int(length) for length in hidden.lengths(params)[::4]]
        (12, [0, 1, 1])
    """
    kind = "unseen"
    incoming = check_paths(kind, "incoming", params, incoming)
    units = layer_width(kind, params, incoming)
    outgoing = _behind(kind, params, incoming, outgoing, units)
    leaves = leaves_by_path(params)
    least = min(len(leaves[path]) for path in outgoing)
    if units <= least:
        raise ValueError(
            f"{kind}(incoming={incoming[0]!r}, outgoing={outgoing!r}) must be of more units than "
            f"the smallest width behind them, or all of them are seen; there are {units} and "
            f"{least}. Try early_translation, or none."
        )
    entries = sum(leaves[path].size for path in incoming)
    return Blind(
        name or f"{kind} by {outgoing[-1]} of {incoming[0]}", kind, entries, incoming, outgoing
    )


def early_translation(
    params: Params, incoming: str, outgoing: Paths, *, name: str | None = None
) -> FreeGenerator:
    """Adds the same to all logits from an early one of linear layers: W1 -> W1 + M^+ 1 a'.

    Exact where 1 is in the range of M, as it is with at least as many units as classes. Together
    with `translation` it moves the logits by any affine function of the inputs.

    Args:
        params: of the network, for the shapes.
        incoming: path of W1, of shape (units, inputs).
        outgoing: path of W2, of shape (outputs, units), or those of several such matrices one
            behind the other, without a nonlinearity in between.
        name: by default made of the kind and the layer.
    """
    kind, leaves = "early translation", leaves_by_path(params)
    (incoming,) = check_paths(kind, "incoming", params, incoming)
    first = leaves[incoming]
    outgoing = _behind(kind, params, (incoming,), outgoing, _rows(first))
    action = _EarlyTranslation(incoming, outgoing)
    name = name or f"{kind} of {incoming}"
    return FreeGenerator(name, kind, first.shape[1], action, orthogonal=True)


def unreached(
    params: Params,
    layers: Sequence[tuple[str, str | None]],
    outgoing: str,
    output: str | None = None,
    *,
    name: str | None = None,
) -> FreeGenerator:
    """Moves the weight behind linear units in directions that they never take: V with V W1 = 0.

        W2 -> W2 + A Q,   b2 -> b2 - A Q b1,   Q the projection on what W1' makes zero

    A unit of this symmetry is an entry of A, of which there are as many as of W2: tangents are not
    independent. There are such directions where units are more than the smallest width in front of
    them, inputs included, and only then it is built. What gradient flow conserves is not known.

    Args:
        params: of the network, for the shapes.
        layers: paths of W1 and b1, the bias being None where there is none; or those of several
            such layers, in the order in which they are applied, without a nonlinearity in between.
        outgoing: path of W2, of shape (outputs, units).
        output: path of b2, if there is one; without it, directions are also orthogonal to what b1
            makes of the units.
        name: by default made of the kind and the layer.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"w1": jnp.array([[1.0], [0.0]]), "w2": jnp.zeros((3, 2))}
        >>> one = unreached(params, [("['w1']", None)], "['w2']")
        >>> [int(length) for length in one.lengths(params)]
        [0, 1, 0, 1, 0, 1]
    """
    kind, leaves = "unreached", leaves_by_path(params)
    weights = check_paths(kind, "layers", params, tuple(weight for weight, _ in layers))
    (outgoing,) = check_paths(kind, "outgoing", params, outgoing)
    _behind(kind, params, weights[:1], (*weights[1:], outgoing), _rows(leaves[weights[0]]))
    biases = [(bias, leaves[weight]) for weight, bias in layers]
    for bias, behind in (*biases, (output, leaves[outgoing])):
        if bias is not None and array_at(kind, leaves, bias).shape != behind.shape[:1]:
            raise ValueError(
                f"{kind} needs a bias of {len(behind)} entries at params{bias}; it has shape "
                f"{leaves[bias].shape}. Try that of the layer."
            )
    least, units = min(leaves[path].shape[1] for path in weights), leaves[outgoing].shape[1]
    if units <= least:
        raise ValueError(
            f"{kind}(layers={layers!r}) must make more units than the smallest width in front of "
            f"them, or all directions are reached; there are {units} and {least}."
        )
    action = _Unreached(tuple(layers), outgoing, output)
    name = name or f"{kind} by {weights[-1]} of {outgoing}"
    return FreeGenerator(name, kind, leaves[outgoing].size, action)


def product_of(owner: str, params: Params, paths: tuple[str, ...]) -> Float[Array, "output unit"]:
    """Returns the product of matrices, of which the first is applied first."""
    first, *rest = (array_at(owner, leaves_by_path(params), path) for path in paths)
    for path, matrix in zip(paths[1:], rest, strict=True):
        if matrix.ndim != 2 or matrix.shape[1:] != first.shape[:1]:
            raise ValueError(
                f"{owner} needs a matrix of {len(first)} columns at params{path}; it has shape "
                f"{matrix.shape}. Try building the symmetry from these params."
            )
        first = matrix @ first
    return first


def _rows(array: Array) -> int | None:
    """Returns the number of rows of a matrix, and None of what is none."""
    return array.shape[0] if array.ndim == 2 else None


def _behind(
    kind: str, params: Params, incoming: tuple[str, ...], outgoing: Paths, units: int | None
) -> tuple[str, ...]:
    """Returns the paths of matrices that follow on some units, refusing others."""
    outgoing = check_paths(kind, "outgoing", params, outgoing)
    leaves = leaves_by_path(params)
    shapes = [leaves[path].shape for path in outgoing]
    widths = [units, *(shape[0] for shape in shapes if shape)]
    fits = all(len(shape) == 2 for shape in shapes) and set(incoming).isdisjoint(outgoing)
    if not fits or [shape[1] for shape in shapes] != widths[:-1]:
        raise ValueError(
            f"{kind}(incoming={incoming[0]!r}, outgoing={outgoing!r}) must be the weights of two "
            f"dense layers, one behind the other, or of more; they have shapes "
            f"{leaves[incoming[0]].shape} and {shapes}. Try arrays of shapes (units, inputs) and "
            "(outputs, units)."
        )
    return outgoing


def _pseudo_inverse(matrix: Float[Array, "row column"]) -> Float[Array, "column row"]:
    """Returns it, of half precision too."""
    half = jnp.finfo(matrix.dtype).bits < 32
    precise = matrix.astype(jnp.float32) if half else matrix
    return jnp.linalg.pinv(precise).astype(matrix.dtype)


class _Unreached(eqx.Module):
    """The action of `unreached`; equal ones are compiled once."""

    layers: tuple[tuple[str, str | None], ...] = eqx.field(static=True)
    outgoing: str = eqx.field(static=True)
    output: str | None = eqx.field(static=True)

    def __call__(self, params: Params, amounts: Units) -> Params:
        owner, leaves = "unreached", leaves_by_path(params)
        before = product_of(owner, params, tuple(weight for weight, _ in self.layers))
        after = array_at(owner, leaves, self.outgoing)
        if after.size != amounts.size or after.shape[1:] != before.shape[:1]:
            raise ValueError(
                f"The symmetry {owner} of {self.outgoing} needs a weight of {amounts.size} entries "
                f"behind {len(before)} units; it has shape {after.shape}. Try building the "
                "symmetry from these params."
            )
        resting = jnp.zeros(before.shape[1], before.dtype)
        for weight, bias in self.layers:
            resting = leaves[weight] @ resting
            resting = resting if bias is None else resting + array_at(owner, leaves, bias)
        if self.output is None:
            before = jnp.concatenate([before, resting[:, None]], axis=1)
        moves = amounts.reshape(after.shape)
        moves = moves - (moves @ before) @ _pseudo_inverse(before)
        new = {self.outgoing: after + moves}
        if self.output is not None:
            new[self.output] = array_at(owner, leaves, self.output) - moves @ resting
        return with_leaves(params, new, others=True)


class _EarlyTranslation(eqx.Module):
    """The action of `early_translation`; equal ones are compiled once."""

    incoming: str = eqx.field(static=True)
    outgoing: tuple[str, ...] = eqx.field(static=True)

    def __call__(self, params: Params, amounts: Units) -> Params:
        before = array_at("early translation", leaves_by_path(params), self.incoming)
        behind = product_of("early translation", params, self.outgoing)
        towards = _pseudo_inverse(behind) @ jnp.ones(len(behind), behind.dtype)
        new = {self.incoming: before + jnp.outer(towards, amounts)}
        return with_leaves(params, new, others=True)
