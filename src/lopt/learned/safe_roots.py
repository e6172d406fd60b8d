"""Roots whose derivatives at zero are zero, in place of the roots of any function.

Adaptive optimizers divide by the root of a second moment. Where the moment is exactly zero, for a
dead unit or a pixel that is always black, the derivative is infinity times zero. One such NaN
spoils the derivative of a whole run. The update there is zero on both sides, so its derivative
should be zero. Values do not change: Adam keeps its epsilon. Derivatives of powers that overflow
(the power -3/2 of 1e-30 in single precision, as in Adafactor) become zero as well.
"""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Array, Float

Tensor = Float[Array, "..."]
_ARRAYS = (jax.Array, np.ndarray, np.generic)


def with_safe_roots(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the same function of pytrees of arrays, with derivatives that survive zeros.

    Arguments that are not arrays, such as functions and names, are constants. Roots and powers
    inside of loops stay as they are.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> jax.grad(jnp.sqrt)(0.0).item()
        inf
        >>> jax.grad(with_safe_roots(jnp.sqrt))(0.0).item()
        0.0
    """

    def safe(*args: Any) -> Any:
        arrays, constants = eqx.partition(args, lambda leaf: isinstance(leaf, _ARRAYS))

        def of_arrays(*arrays: Any) -> Any:
            return function(*eqx.combine(arrays, constants))

        closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays)
        results = _evaluate(closed, jax.tree.leaves(arrays))
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return safe


def _evaluate(closed: core.ClosedJaxpr, arguments: list[Any]) -> list[Any]:
    """Runs a traced function, one operation after the other."""
    values: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    values |= zip(closed.jaxpr.invars, arguments, strict=True)

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for equation in closed.jaxpr.eqns:
        inputs, parameters = [read(variable) for variable in equation.invars], equation.params
        name = equation.primitive.name
        if name in _SAFE:
            # A number that is written into the program is not yet an array.
            arrays = zip(inputs, equation.invars, strict=True)
            results = [_SAFE[name](*(jnp.asarray(x, v.aval.dtype) for x, v in arrays))]
        elif name in ("pjit", "jit"):
            results = _evaluate(parameters["jaxpr"], inputs)
        elif name == "cond":
            branches = [functools.partial(_branch, branch) for branch in parameters["branches"]]
            results = jax.lax.switch(inputs[0], branches, *inputs[1:])
        else:
            primitive = equation.primitive
            found = primitive.bind(*inputs, **primitive.get_bind_params(parameters))
            results = found if primitive.multiple_results else [found]
        values |= zip(equation.outvars, results, strict=True)
    return [read(variable) for variable in closed.jaxpr.outvars]


def _branch(closed: Any, *arguments: Any) -> list[Any]:
    results = zip(_evaluate(closed, list(arguments)), closed.out_avals, strict=True)
    # A number that is written into one branch must have the dtype of the others' arrays.
    return [x if isinstance(x, jax.Array) else jnp.asarray(x, aval.dtype) for x, aval in results]


def _finite(slope: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Returns the slope at x where that is finite, and zero elsewhere, to any order."""
    fine = jnp.isfinite(slope(x))
    return jnp.where(fine, slope(jnp.where(fine, x, jnp.ones_like(x))), jnp.zeros_like(x))


def _safe(root: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor]) -> Any:
    """Returns a root with this slope where that is finite."""
    safe = jax.custom_jvp(root)
    safe.defjvp(lambda x, tangent: (safe(*x), tangent[0] * _finite(slope, *x)))
    return safe


_sqrt: Callable[[Tensor], Tensor] = _safe(jax.lax.sqrt, lambda x: 0.5 / _sqrt(x))
_rsqrt: Callable[[Tensor], Tensor] = _safe(jax.lax.rsqrt, lambda x: -0.5 * _rsqrt(x) / x)


@jax.custom_jvp
def _pow(x: Tensor, y: Array) -> Tensor:
    return jax.lax.pow(x, y)


@_pow.defjvp
def _pow_jvp(primals: Any, tangents: Any) -> tuple[Tensor, Tensor]:
    (x, y), (x_tangent, y_tangent) = primals, tangents
    power, exponent = _pow(x, y), y.astype(x.dtype)
    tangent = x_tangent * _finite(lambda x: exponent * _pow(x, y - jnp.ones_like(y)), x)
    if jnp.issubdtype(y.dtype, jnp.floating):
        tangent = tangent + y_tangent * _finite(lambda x: _pow(x, y) * jnp.log(x), x)
    return power, tangent


_SAFE: dict[str, Callable[..., Any]] = {"sqrt": _sqrt, "rsqrt": _rsqrt, "pow": _pow}
