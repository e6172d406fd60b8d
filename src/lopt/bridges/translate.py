"""From a JAX function to the source of one that needs no JAX.

The steps of the function are written down as Python, one line for each result that is read more
than once or is long. Loops over slabs stay loops.
"""

import itertools
import linecache
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import equinox as eqx
import jax
import numpy as np

from lopt.bridges import operations
from lopt.bridges.operations import Language
from lopt.bridges.trace import Block, Step, Tracer, Value, is_splat
from lopt.core import tensors

LONGEST_EXPRESSION = 72


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
        file = f"<lopt.bridges {id(self)}>"
        linecache.cache[file] = len(self.source), None, self.source.splitlines(True), file
        exec(compile(self.source, file, "exec"), namespace)
        return namespace["program"]


def translate(
    function: Callable[..., Any],
    *arguments: Any,
    language: Language = operations.TORCH,
    slabs: float = 1.0,
) -> tuple[Program, Any]:
    """Returns the program of a function of pytrees, and its results as a pytree of shapes.

    Args:
        function: traceable by JAX.
        *arguments: pytrees of arrays or shapes, whose leaves are the program's inputs, in order.
        language: in which the program is written.
        slabs: how many times larger than XLA's the slabs are in which large tensors are worked on.

    Raises:
        NotImplementedError: if the function uses a primitive that has no translation.
    """
    token = tensors.SLABS.set(slabs)
    try:
        # Of a function that it knows JAX would remember what it was with other slabs.
        closed, shapes = jax.make_jaxpr(lambda *a: function(*a), return_shape=True)(*arguments)
    finally:
        tensors.SLABS.reset(token)
    tracer = Tracer()
    inputs = [Value(variable.aval) for variable in closed.jaxpr.invars]
    results = tracer.run(closed, inputs)
    return _Writer(language).program(Block(inputs, tracer.steps, results)), shapes


class _Writer:
    """Source, line by line. The names of variables that nothing reads any more are used again."""

    def __init__(self, language: Language) -> None:
        self.language, self.in_torch = language, language is operations.TORCH
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
        results = ", ".join(map(self.result, block.results))
        head = ["def program(constants, inputs):"]
        given = {"constants": [name for name, _ in self.constants.values()]}
        given["inputs"] = [value.text for value in block.inputs]
        for name, names in given.items():
            head += [f"    [{', '.join(names)}] = {name}"] if names else []
        source = "\n".join([*head, *self.lines, f"    return [{results}]", ""])
        constants = [array for _, array in self.constants.values()]
        return Program(self.language.render(source), constants, reads)

    def result(self, value: Value) -> str:
        """Returns a result; of PyTorch, whose caller may write into inputs, none is one of them."""
        text, of_input = _bare(self.array(value)), [v.text[0] == "x" for v in value.variables]
        is_input = self.in_torch and not value.owned and of_input and all(of_input)
        return f"{text}.clone()" if is_input else text

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
        base = np.asarray(known[tuple(slice(None if x else 1) for x in known.strides)])
        base = base.reshape(()) if is_splat(known) else base
        key = base.dtype, base.shape, base.tobytes()
        if key not in self.constants:
            self.constants[key] = self.fresh("c"), base
        name = self.constants[key][0]
        same = base.shape == shape
        return name if same else f"@.broadcast_to({name}, {operations.shape_text(shape)})"

    def operand(self, value: Value) -> str:
        """Returns a value as a number, if it is known to be one, or as an array."""
        if value.known is not None and is_splat(value.known):
            return operations.number_text(value.known)
        return self.array(value)

    def block(self, block: Block) -> None:
        """Writes all steps."""
        for step in _with_products(block.steps) if self.in_torch else block.steps:
            if step.name == "scan":
                self.loop(step)
            elif step.name == "dynamic_update_slice":
                self.put(step)
            else:
                self.step(step)

    def step(self, step: Step) -> None:
        """Writes a step, or puts it into the one that reads it."""
        (result,), name = step.results, step.name
        shapes = {v.aval.shape for v in step.operands if v.known is None or not is_splat(v.known)}
        numbers = name in operations.ELEMENTWISE and result.aval.shape in shapes
        texts = [
            self.operand(v) if numbers or (name, i) in operations.NUMBERS else self.array(v)
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
        if not self.in_torch or not _is_large(out):
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

    def give_name(self, value: Value) -> None:
        """Writes an expression down."""
        if value.known is None and not value.text.isidentifier():
            text = _bare(value.text)
            self.read([value])
            value.text, value.variables = self.fresh("v"), (value,)
            self.line(f"{value.text} = {text}")

    def put(self, step: Step) -> None:
        """Writes a part of an array into it, where it is a loop's own, or into a copy."""
        array, part, *firsts = step.operands
        name, result = self.array(array), step.results[0]
        if not name.startswith("w") or array.reads > 1:
            copy = self.fresh("w")
            self.line(f"{copy} = {name}.clone()")
            name = copy
        rows = zip(map(self.operand, firsts), part.aval.shape, array.aval.shape, strict=True)
        cuts = [":" if size == all_ else f"{i}:{i} + {size}" for i, size, all_ in rows]
        self.line(f"{name}[{', '.join(cuts)}] = {_bare(self.array(part))}")
        self.read(step.operands)
        result.text, result.variables = name, (result,)

    def loop(self, step: Step) -> None:
        """Writes a loop. What it carries has names of its own, and arrays that it may write to."""
        assert step.body is not None
        fixed, body = step.params["num_consts"], step.body
        count = step.params["num_carry"]
        starts, stacks = step.operands[fixed : fixed + count], step.operands[fixed + count :]
        carries, rows = body.inputs[:count], body.inputs[count:]
        for carry, start in zip(carries, starts, strict=True):
            carry.text, carry.variables = self.fresh("w"), (carry,)
            self.line(
                f"{carry.text} = {_bare(self.array(start))}" + ".clone()" * bool(start.aval.shape)
            )
        for stack in stacks:  # read in every pass
            self.give_name(stack)
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
            value.text, value.variables = carry.text, (value,)
        for value, name in zip(step.results[count:], lists, strict=True):
            value.text = name
            self.line(f"{name} = @.stack({name})")
        self.read(step.operands)


def _is_large(aval: Any) -> bool:
    """Whether passes over an array cost more than calls."""
    return all(isinstance(size, int) for size in aval.shape) and aval.size >= operations.MANY


def _with_products(steps: list[Step]) -> list[Step]:
    """Returns steps in which a large product that is only added to something is no step."""
    made = {result: step for step in steps for result in step.results}
    for step in steps:
        if step.name != "add" or not _is_large(step.results[0].aval):
            continue
        for other, value in (step.operands, step.operands[::-1]):
            product, shape = made.get(value), step.results[0].aval.shape
            single = value.reads == 1 and other.aval.shape == value.aval.shape == shape
            if product is not None and product.name == "mul" and single and other.known is None:
                step.name, step.operands = "addcmul", [other, *product.operands]
                value.reads = 0
                break
    return [step for step in steps if any(result.reads for result in step.results)]


def _bare(text: str) -> str:
    """Returns an expression without parentheses around all of it."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth and place < len(text) - 1:
            return text
    return text[1:-1] if text.startswith("(") else text
