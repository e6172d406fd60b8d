"""From a JAX function to the source of one that needs no JAX.

The function is traced, calls in it are opened, what depends on no input is computed here, and what
it computes twice, once. The rest is written down as Python, one line for each result that is read
more than once or is long. Loops over slabs stay loops.
"""

import itertools
import linecache
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.extend import core

from lopt.torch import operations
from lopt.torch.operations import NUMPY, Language, Operation

# What has more numbers is not computed here, but by the program, from smaller constants.
LARGEST_CONSTANT = 2**16
LONGEST_EXPRESSION = 72


class Value:
    """A result.

    Attributes:
        aval: its shape and dtype.
        known: its numbers, if they depend on no input.
        passes: its number in each pass of a loop, if that depends on no input.
        text, variables: its name, or an expression and the variables that this reads.
        reads: how often it is still to be read.
        owned: whether nothing else holds its memory.
    """

    def __init__(self, aval: Any, known: np.ndarray | None = None) -> None:
        self.aval, self.known = aval, known
        self.passes: list[Any] | None = None
        self.text, self.variables, self.reads = "", tuple[Value, ...](), 0
        self.owned = False


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


class Program(eqx.Module):
    """A function from a list of arrays to a list of arrays, as source.

    Attributes:
        source: of `program(constants, inputs)`, in the names of the module of its language.
        constants: the arrays that it needs.
        reads: whether it reads each of its inputs.
    """

    source: str
    constants: list[np.ndarray]
    reads: list[bool]

    def function(self, **namespace: Any) -> Callable[[Sequence[Any], Sequence[Any]], list[Any]]:
        """Returns the function, for the modules that it names. Tracebacks show its lines."""
        file = f"<lopt.torch {id(self)}>"
        linecache.cache[file] = len(self.source), None, self.source.splitlines(True), file
        exec(compile(self.source, file, "exec"), namespace)
        return namespace["program"]


def translate(
    function: Callable[..., Any], *arguments: Any, language: Language = operations.TORCH
) -> tuple[Program, Any]:
    """Returns the program of a function of pytrees, and its results as a pytree of shapes.

    Args:
        function: traceable by JAX.
        *arguments: pytrees of arrays or shapes, whose leaves are the program's inputs, in order.
        language: in which the program is written.

    Raises:
        NotImplementedError: if the function uses a primitive that has no translation.
    """
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    tracer = _Tracer()
    inputs = [Value(variable.aval) for variable in closed.jaxpr.invars]
    results = tracer.run(closed, inputs)
    return _Writer(language).program(Block(inputs, tracer.steps, results)), shapes


class _Tracer:
    """The steps of a function, as they are found; of the body of a loop of so many passes."""

    def __init__(self, passes: int = 0) -> None:
        self.steps: list[Step] = []
        self.passes = passes
        self.seen: dict[Any, Step] = {}
        self.sources: dict[Value, Value] = {}  # of what is reshaped

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
        if name == "select_n" and first.known is not None and _is_splat(first.known):
            return [operands[1 + int(first.known.flat[0])]]
        if name == "cond":
            return self.choice(params["branches"], *operands)
        if name == "scan":
            return self.loop(params, operands, avals)
        if name == "gather" and (rows := operations.neighbours(params, operands)) is not None:
            shape = first.aval.shape
            cut = {"start_indices": [rows.start, *(0 for _ in shape[1:])], "strides": None}
            cut["limit_indices"] = [rows.stop, *shape[1:]]
            return self.step("slice", cut, [first], avals)
        if name == "split":
            return self.split(params, operands, avals)
        if name == "iota":
            numbers = np.arange(params["shape"][params["dimension"]]).astype(params["dtype"])
            axes = {"broadcast_dimensions": (params["dimension"],)}
            return self.step("broadcast_in_dim", axes, [_constant(numbers)], avals)
        for call in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
            if call in params:
                return self.run(params[call], operands)
        if name in ("mul", "div") and first.aval.shape == avals[0].shape:
            by = operands[1].known
            if by is not None and _is_splat(by) and by.flat[0] == 1:
                return [first]
        if first is not None and operations.is_reshape(name, first.aval, avals[0]):
            name, params = "reshape", {"shape": avals[0].shape}
            operands = [self.sources.get(first, first)]
            if operands[0].aval.shape == avals[0].shape:
                return operands
        if name not in operations.RULES and name != "dynamic_update_slice":
            raise NotImplementedError(
                f"The primitive {name!r} of JAX has no translation; lopt.torch.operations.RULES "
                "may be given one."
            )
        key = name, repr(sorted(params.items(), key=str)), tuple(map(_identity, operands))
        if key not in self.seen:
            step = self.seen[key] = Step(name, params, operands, [Value(aval) for aval in avals])
            if not self.is_known(step):
                self.steps.append(step)
                if name == "reshape":
                    self.sources[step.results[0]] = operands[0]
        return self.seen[key].results

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
            raise NotImplementedError("scan(reverse=True) of JAX has no translation.")
        fixed, body, jaxpr = params["num_consts"], _Tracer(params["length"]), params["jaxpr"]
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
                splat = step.name == "broadcast_in_dim" and _is_splat(known[0])
                result.known = known[0].reshape(-1)[0] if splat else None
                return splat
            views = step.name in ("broadcast_in_dim", "slice", "squeeze")
            if not views and np.prod(shape, dtype=int) > LARGEST_CONSTANT:
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


def _is_splat(array: np.ndarray) -> bool:
    """Whether an array has one number in all places, as its size or its strides tell."""
    return array.size == 1 or (array.size > 0 and not any(array.strides))


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
    array = np.asanyarray(found)
    dtype = step.results[0].aval.dtype
    return array if array.dtype == dtype else array.astype(dtype)


class _Writer:
    """Source, line by line. The names of variables that nothing reads any more are used again."""

    def __init__(self, language: Language) -> None:
        self.language = language
        self.lines: list[str] = []
        self.indent = "    "
        self.constants: dict[Any, tuple[str, np.ndarray]] = {}
        self.counts: dict[str, int] = {}
        self.free: list[str] = []
        self.frozen: set[str] = set()

    def program(self, block: Block) -> Program:
        """Returns the program of a block."""
        reads = [value.reads > 0 for value in block.inputs]
        for value in block.inputs:
            value.text, value.variables = self.fresh("x"), (value,)
        self.block(block)
        results = ", ".join(_bare(self.array(value)) for value in block.results)
        head = ["def program(constants, inputs):"]
        given = {"constants": [name for name, _ in self.constants.values()]}
        given["inputs"] = [value.text for value in block.inputs]
        for name, names in given.items():
            head += [f"    [{', '.join(names)}] = {name}"] if names else []
        source = "\n".join([*head, *self.lines, f"    return [{results}]", ""])
        constants = [array for _, array in self.constants.values()]
        return Program(self.language.render(source), constants, reads)

    def fresh(self, prefix: str) -> str:
        """Returns a new name."""
        self.counts[prefix] = self.counts.get(prefix, -1) + 1
        return f"{prefix}{self.counts[prefix]}"

    def line(self, text: str) -> None:
        """Adds a line."""
        self.lines.append(self.indent + text)

    def array(self, value: Value) -> str:
        """Returns a value as an array, also if it is known."""
        if value.known is None:
            return value.text
        known, shape = value.known, value.aval.shape
        # Of what is the same along an axis, one is stored.
        base = known[tuple(slice(None) if stride else slice(1) for stride in known.strides)]
        base = base.reshape(()) if _is_splat(known) else base
        key = base.dtype, base.shape, base.tobytes()
        if key not in self.constants:
            self.constants[key] = self.fresh("c"), base
        name = self.constants[key][0]
        same = base.shape == shape
        return name if same else f"@.broadcast_to({name}, {operations.shape_text(shape)})"

    def operand(self, value: Value) -> str:
        """Returns a value as a number, if it is known to be one, or as an array."""
        if value.known is not None and _is_splat(value.known):
            return operations.number_text(value.known)
        return self.array(value)

    def block(self, block: Block) -> None:
        """Writes all steps."""
        for step in block.steps:
            if step.name == "scan":
                self.loop(step)
            elif step.name == "dynamic_update_slice":
                self.put(step)
            else:
                self.step(step)

    def step(self, step: Step) -> None:
        """Writes a step, or puts it into the one that reads it."""
        (result,), name = step.results, step.name
        shapes = {v.aval.shape for v in step.operands if v.known is None or not _is_splat(v.known)}
        numbers = name in operations.ELEMENTWISE and result.aval.shape in shapes
        texts = [
            self.operand(v) if numbers or (i and name == "dynamic_slice") else self.array(v)
            for i, v in enumerate(step.operands)
        ]
        if name == "select_n" and all(map(operations.is_number, texts[1:])):
            texts[1:] = map(self.array, step.operands[1:])
        text = self.in_place(step, texts) or step.text(texts)
        self.own(step)
        # What lies in a loop's own array is replaced there.
        if name == "dynamic_slice" and texts[0].startswith("w"):
            text = f"{text}.clone()"
        elif result.reads == 1 and len(text) <= LONGEST_EXPRESSION:
            variables = [leaf for v in step.operands for leaf in v.variables]
            result.text, result.variables = text, tuple(dict.fromkeys(variables))
            for leaf in result.variables:
                leaf.reads += 1
            self.read(step.operands)
            return
        self.read(step.operands)
        result.text, result.variables = self.free.pop() if self.free else self.fresh("v"), (result,)
        self.line(f"{result.text} = {_bare(text)}")

    def in_place(self, step: Step, texts: list[str]) -> str | None:
        """Returns an expression that needs no memory for its result, if there is one."""
        out = step.results[0].aval
        symbolic = not all(isinstance(size, int) for size in out.shape)
        if self.language is not operations.TORCH or symbolic or out.size < operations.MANY:
            return None
        for i, value in enumerate(step.operands):
            alike = value.aval.shape == out.shape and value.aval.dtype == out.dtype
            if alike and value.owned and value.reads == 1:
                return operations.in_place(step.name, texts, i)
        return None

    def own(self, step: Step) -> None:
        """Says whether nothing else holds the memory of the result."""
        result, first = step.results[0], step.operands[0]
        if step.name in operations.VIEWS:
            result.owned = step.name == "reshape" and first.owned and first.reads == 1
            first.owned = False
        else:
            result.owned = True

    def read(self, values: Iterable[Value]) -> None:
        """Says that values have been read once more."""
        for leaf in itertools.chain.from_iterable(value.variables for value in values):
            leaf.reads -= 1
            if not leaf.reads and leaf.text[0] == "v" and leaf.text not in self.frozen:
                self.free.append(leaf.text)

    def put(self, step: Step) -> None:
        """Writes a part of an array into it, where it is a loop's own, or into a copy."""
        array, part, *firsts = step.operands
        name, result = self.array(array), step.results[0]
        if not name.startswith("w"):
            copy = self.fresh("w")
            self.line(f"{copy} = {name}.clone()")
            name = copy
        rows = zip(map(self.operand, firsts), part.aval.shape, array.aval.shape, strict=True)
        cuts = [":" if size == all_ else f"{i}:{i} + {size}" for i, size, all_ in rows]
        self.line(f"{name}[{', '.join(cuts)}] = {_bare(self.array(part))}")
        result.text = name
        self.read(step.operands)

    def loop(self, step: Step) -> None:
        """Writes a loop. What it carries has names of its own, and arrays that it may write to."""
        assert step.body is not None
        fixed, body = step.params["num_consts"], step.body
        count = step.params["num_carry"]
        starts, stacks = step.operands[fixed : fixed + count], step.operands[fixed + count :]
        carries, rows = body.inputs[:count], body.inputs[count:]
        for carry, start in zip(carries, starts, strict=True):
            carry.text = self.fresh("w")
            self.line(
                f"{carry.text} = {_bare(self.array(start))}" + ".clone()" * bool(start.aval.shape)
            )
        variable, known = self.fresh("i"), [row for row in rows if row.passes is not None]
        for row, stack in zip(rows, stacks, strict=True):
            row.text = self.fresh("k") if row in known else f"{self.array(stack)}[{variable}]"
        lists = [self.fresh("s") for _ in step.results[count:]]
        for name in lists:
            self.line(f"{name} = []")
        names = ", ".join([variable, *(row.text for row in known)])
        passes = range(step.params["length"]), *(row.passes for row in known)
        every = list(zip(*passes, strict=True)) if known else passes[0]
        self.line(f"for {names} in {every}:")
        outside = self.free, self.frozen, self.indent
        self.free, self.indent = [], self.indent + "    "
        self.frozen = {f"v{i}" for i in range(self.counts.get("v", -1) + 1)}
        self.block(body)
        texts = [_bare(self.array(value)) for value in body.results]
        for name, text in zip(lists, texts[count:], strict=True):
            self.line(f"{name}.append({text})")
        new = [p for p in zip([c.text for c in carries], texts, strict=False) if p[0] != p[1]]
        if new:
            self.line(" = ".join(", ".join(column) for column in zip(*new, strict=True)))
        self.free, self.frozen, self.indent = outside
        for value, carry in zip(step.results, carries, strict=False):
            value.text = carry.text
        for value, name in zip(step.results[count:], lists, strict=True):
            value.text = name
            self.line(f"{name} = @.stack({name})")
        self.read(step.operands)


def _bare(text: str) -> str:
    """Returns an expression without parentheses around all of it."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth and place < len(text) - 1:
            return text
    return text[1:-1] if text.startswith("(") else text
