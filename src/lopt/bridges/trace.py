"""What a JAX function does, step by step.

Calls in it are opened, what depends on no input is computed, and what it computes twice, once.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from lopt.bridges import operations
from lopt.bridges.operations import NUMPY, Operation

# What has more numbers is not computed here, but by the program, from smaller constants.
LARGEST_CONSTANT = 2**16


class Value:
    """A result.

    Attributes:
        aval: its shape and dtype.
        known: its numbers, if they depend on no input.
        passes: its number in each pass of a loop, if that depends on no input.
        text, variables: its name, or an expression and the variables that this reads.
        reads: how often it is still to be read.
        owned: whether nothing else holds its memory.
        is_size: whether it is a size of an array that is not known, a number.
    """

    def __init__(self, aval: Any, known: np.ndarray | None = None) -> None:
        self.aval, self.known = aval, known
        self.passes: list[Any] | None = None
        self.text, self.variables, self.reads = "", tuple[Value, ...](), 0
        self.owned = self.is_size = False


class Step:
    """A primitive with its operands and results; a loop has a body."""

    def __init__(self, name: str, params: dict[str, Any], operands: Any, results: Any) -> None:
        self.name, self.params, self.operands, self.results = name, params, operands, results
        self.body: Block | None = None

    def text(self, operands: Sequence[str]) -> str:
        """Returns its result as an expression."""
        avals = [value.aval for value in self.operands]
        return operations.RULES[self.name](
            Operation(self.params, operands, avals, self.results[0].aval)
        )


class Block:
    """Steps in order. What nothing reads is left out."""

    def __init__(self, inputs: list[Value], steps: list[Step], results: list[Value]) -> None:
        self.inputs, self.results, kept = inputs, results, []
        for value in results:
            value.reads += 1
        for step in reversed(steps):
            if any(value.reads for value in step.results):
                kept.append(step)
                for value in step.operands:
                    value.reads += 1
        self.steps = kept[::-1]


class Tracer:
    """The steps of a function, as they are found; of the body of a loop of so many passes."""

    def __init__(self, passes: int = 0) -> None:
        self.steps: list[Step] = []
        self.passes = passes
        self.seen: dict[Any, Step] = {}
        self.made: dict[Value, Step] = {}

    def run(self, jaxpr: Any, inputs: Sequence[Value]) -> list[Value]:
        """Adds the steps of a jaxpr, closed or without constants; returns its results."""
        consts = [_constant(value) for value in getattr(jaxpr, "consts", ())]
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        found = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

        def read(atom: Any) -> Value:
            literal = isinstance(atom, core.Literal)
            return _constant(np.asarray(atom.val, atom.aval.dtype)) if literal else found[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            avals = [variable.aval for variable in equation.outvars]
            results = self.step(equation.primitive.name, equation.params, operands, avals)
            found.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def step(
        self, name: str, params: dict[str, Any], operands: list[Value], avals: list[Any]
    ) -> list[Value]:
        """Adds what a primitive does; returns its results."""
        first: Any = operands[0] if operands else None
        if name in operations.IDENTITIES or params.get("axes") == ():
            return operands
        if name == "convert_element_type" and first.aval.dtype == avals[0].dtype:
            return operands
        if name == "dim_as_value":
            size = Value(avals[0])
            size.text, size.is_size = f"({params['dim']})", True
            return [size]
        if name in ("convert_element_type", "broadcast_in_dim") and first.is_size:
            size = Value(avals[0])
            size.text, size.is_size = first.text, True
            return [size]
        if name == "select_n" and first.known is not None and is_splat(first.known):
            return [operands[1 + int(first.known.flat[0])]]
        if name == "cond":
            return self.choice(params["branches"], *operands)
        if name == "scan":
            return self.loop(params, operands, avals)
        if name == "gather" and (rows := operations.neighbours(params, operands)) is not None:
            shape, (out,) = (len(rows), *first.aval.shape[1:]), avals
            cut = {"start_indices": [rows.start, *(0 for _ in shape[1:])], "strides": None}
            cut["limit_indices"] = [rows.stop, *shape[1:]]
            (found,) = self.step("slice", cut, [first], [out.update(shape=shape)])
            return self.step("reshape", {}, [found], avals)
        if name == "split":
            return self.split(params, operands, avals)
        if name == "iota":
            numbers = np.arange(params["shape"][params["dimension"]]).astype(params["dtype"])
            axes = {"broadcast_dimensions": (params["dimension"],)}
            return self.step("broadcast_in_dim", axes, [_constant(numbers)], avals)
        for call in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if call in params:
                return self.run(params[call], operands)
        if name == "slice" and first.aval.shape == avals[0].shape:
            return [first]
        if name == "div" and first.is_size and operands[1].text == first.text:
            return [_constant(np.ones((), avals[0].dtype))]
        if name == "integer_pow" and params["y"] in (1, 2):
            return operands if params["y"] == 1 else self.step("square", {}, operands, avals)
        if name in operations.NEUTRAL:
            for value, other in (operands, operands[::-1])[: 1 + (name in ("add", "mul"))]:
                alike = value.aval.shape == avals[0].shape
                if alike and _is_filled_with(operations.NEUTRAL[name], other.known):
                    return [value]
        if first is not None and operations.is_reshape(name, first.aval, avals[0]):
            name, params = "reshape", {"shape": avals[0].shape}
            made = self.made.get(first)
            operands = made.operands if made and made.name == "reshape" else [first]
            if operands[0].aval.shape == avals[0].shape:
                return operands
        if name not in operations.RULES and name != "dynamic_update_slice":
            raise operations.untranslated(f"The primitive {name!r}")
        key = name, repr(sorted(params.items(), key=str)), tuple(map(_identity, operands))
        if key not in self.seen:
            step = Step(name, params, operands, [Value(aval) for aval in avals])
            step = self.seen[key] = self.average(step) or step
            if not self.is_known(step):
                self.steps.append(step)
                self.made[step.results[0]] = step
        return self.seen[key].results

    def average(self, step: Step) -> Step | None:
        """Returns a + w (b - a), the step of a moving average, as one step."""
        if step.name != "add" or not jnp.issubdtype(step.results[0].aval.dtype, jnp.floating):
            return None
        for old, change in (step.operands, step.operands[::-1]):
            product = self.made.get(change)
            if product is None or product.name != "mul" or old.aval.shape != change.aval.shape:
                continue
            for weight, way in (product.operands, product.operands[::-1]):
                made = self.made.get(way)
                if made is not None and made.name == "sub" and made.operands[1] is old:
                    return Step("lerp", {}, [old, made.operands[0], weight], step.results)
        return None

    def split(self, params: dict[str, Any], operands: list[Value], avals: list[Any]) -> list[Value]:
        """Adds slices."""
        axis, results, first = params["axis"], list[Value](), 0
        for aval in avals:
            starts, limits = [0] * len(aval.shape), list(aval.shape)
            starts[axis], limits[axis] = first, first + aval.shape[axis]
            cut = {"start_indices": starts, "limit_indices": limits, "strides": None}
            results += self.step("slice", cut, operands, [aval])
            first = limits[axis]
        return results

    def choice(self, branches: Sequence[Any], index: Value, *rest: Value) -> list[Value]:
        """Adds the branch that is taken, or, if that is not known, all of them and selections."""
        if index.known is not None:
            return self.run(branches[int(index.known)], rest)
        results = self.run(branches[0], rest)
        for number, branch in enumerate(branches[1:], 1):
            wanted = _constant(np.asarray(number, index.aval.dtype))
            bits = [jax.ShapeDtypeStruct((), bool)]
            (taken,) = self.step("eq", {}, [index, wanted], bits)
            pairs = zip(results, self.run(branch, rest), strict=True)
            results = [self.step("select_n", {}, [taken, a, b], [a.aval])[0] for a, b in pairs]
        return results

    def loop(self, params: dict[str, Any], operands: list[Value], avals: list[Any]) -> list[Value]:
        """Adds a scan. What is known of each of its passes, its body knows."""
        if params["reverse"]:
            raise operations.untranslated("scan(reverse=True)")
        fixed, body, jaxpr = params["num_consts"], Tracer(params["length"]), params["jaxpr"]
        rows = [Value(variable.aval) for variable in jaxpr.jaxpr.invars[fixed:]]
        for row, stack in zip(rows, operands[fixed:], strict=True):
            if stack.known is not None and row.aval.shape == () and stack.known.ndim == 1:
                row.passes = stack.known.tolist()
        results = body.run(jaxpr, [*operands[:fixed], *rows])
        step = Step("scan", params, operands, [Value(aval) for aval in avals])
        step.body = Block(rows, body.steps, results)
        self.steps.append(step)
        return step.results

    def is_known(self, step: Step) -> bool:
        """Computes the result of a step, if it is known or is for each pass; returns whether."""
        (result,), known = step.results, [value.known for value in step.operands]
        shape = result.aval.shape
        if step.name == "dynamic_update_slice":
            return False
        if all(one is not None for one in known):
            if not all(isinstance(size, int) for size in shape):  # a number in all places
                splat = step.name == "broadcast_in_dim" and is_splat(known[0])
                result.known = np.asarray(known[0].reshape(-1)[0]) if splat else None
                return splat
            if any(value.known.shape != value.aval.shape for value in step.operands):
                return False
            if (
                step.name not in ("broadcast_in_dim", "slice")
                and np.prod(shape, dtype=int) > LARGEST_CONSTANT
            ):
                return False
            result.known = _evaluate(step, known)
        elif shape == () and all(v.passes or v.known is not None for v in step.operands):
            columns = [v.passes or [v.known] * self.passes for v in step.operands]
            dtypes = [value.aval.dtype for value in step.operands]
            found = [
                _evaluate(step, [np.asarray(x, d) for x, d in zip(row, dtypes, strict=True)])
                for row in zip(*columns, strict=True)
            ]
            result.passes = [one.item() for one in found]
            result.known = found[0] if len(set(result.passes)) == 1 else None
        return result.known is not None or result.passes is not None


def _constant(value: Any) -> Value:
    array = np.asarray(value)
    return Value(jax.ShapeDtypeStruct(array.shape, array.dtype), array)


def is_splat(array: np.ndarray) -> bool:
    """Whether an array has one number in all places, as its size or its strides tell."""
    return array.size == 1 or (array.size > 0 and not any(array.strides))


def _is_filled_with(number: int, array: np.ndarray | None) -> bool:
    return array is not None and is_splat(array) and bool(array.flat[0] == number)


def _identity(value: Value) -> Any:
    """Returns what values that are the same have in common."""
    if value.known is None or value.known.size > 1:
        return value
    return value.aval.shape, value.aval.dtype, value.known.tobytes()


def _evaluate(step: Step, operands: Sequence[np.ndarray]) -> np.ndarray:
    names = {f"x{i}": operand for i, operand in enumerate(operands)}
    numbers = step.name == "dynamic_slice"  # begins at numbers
    texts = [str(int(x)) if numbers and i else f"x{i}" for i, x in enumerate(operands)]
    with np.errstate(all="ignore"):
        found = eval(NUMPY.render(step.text(texts)), {**operations.NUMPY_SCOPE, **names})
    return np.asarray(found, step.results[0].aval.dtype)
