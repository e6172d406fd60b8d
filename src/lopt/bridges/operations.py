"""JAX's primitives in the words of PyTorch, of NumPy and of jax.numpy, which are nearly the same.

One expression for each primitive, in which `@.` stands for the module. Operands are texts: names of
arrays, or Python numbers, which take the precision of the arrays that they meet.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Language:
    """A module of array functions, and what it calls otherwise than PyTorch."""

    module: str
    others: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def render(self, text: str) -> str:
        """Returns a text with the module in place of `@`."""
        return re.sub(r"@\.(\w+)", lambda m: self.others.get(m[1], f"{self.module}.{m[1]}"), text)


JAX_NAMES = {"amax": "max", "amin": "min", "permute": "permute_dims"}
TORCH = Language("torch", {"astype": "torch.Tensor.to"})
JAX = Language(
    "jnp",
    {name: f"jnp.{other}" for name, other in JAX_NAMES.items()}
    | {"rsqrt": "jax.lax.rsqrt", "sigmoid": "jax.nn.sigmoid"}
    | {name: f"jax.lax.{name}" for name in ("erf", "erfc")}
    | {"lerp": "lerp"},
)
NUMPY = Language(
    "np",
    {name: f"np.{other}" for name, other in JAX_NAMES.items()}
    | {name: name for name in ("rsqrt", "sigmoid", "erf", "erfc", "lerp", "bfloat16")},
)
# In which source in the words of NumPy is evaluated. JAX has few functions that NumPy lacks.
NUMPY_SCOPE: dict[str, Any] = {
    "np": np,
    "math": math,
    "bfloat16": jnp.bfloat16,
    "lerp": lambda a, b, w: a + w * (b - a),
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "erf": np.vectorize(math.erf),
    "erfc": np.vectorize(math.erfc),
}


class Operation:
    """One application of a primitive: its texts, and the shapes and dtypes of its operands."""

    def __init__(self, params: dict[str, Any], texts: Sequence[str], avals: Any, out: Any) -> None:
        self.params, self.texts, self.avals, self.out = params, texts, avals, out

    def __getitem__(self, name: str) -> Any:
        return self.params[name]


Rule = Callable[[Operation], str]


def shape_text(shape: Sequence[Any]) -> str:
    """Returns a shape as source; sizes may be symbolic."""
    return "(" + "".join(f"{size}, " for size in shape).removesuffix(" ") + ")"


def dtype_text(dtype: Any) -> str:
    """Returns a dtype as source."""
    return f"@.{np.dtype(dtype).name}"


def untranslated(what: str) -> NotImplementedError:
    """Returns the error of what has no rule."""
    return NotImplementedError(
        f"{what} of JAX has no translation; lopt.bridges.operations.RULES may be given one."
    )


def _call(name: str) -> Rule:
    return lambda o: f"@.{name}({', '.join(o.texts)})"


def _infix(symbol: str) -> Rule:
    return lambda o: f"({o.texts[0]} {symbol} {o.texts[1]})"


def _bound(name: str, side: str) -> Rule:
    """Returns a rule for the larger or smaller of two, where one may be a number."""

    def rule(o: Operation) -> str:
        numbers = [is_number(text) for text in o.texts]
        if not any(numbers):
            return f"@.{name}({o.texts[0]}, {o.texts[1]})"
        array, number = o.texts[:: -1 if numbers[0] else 1]
        bounds = f"{number}, None" if side == "min" else f"None, {number}"
        return f"@.clip({array}, {bounds})"

    return rule


def is_number(text: str) -> bool:
    """Whether an operand is written as a number."""
    return text[0] in "-0123456789" or text in ("True", "False", "math.inf", "math.nan")


def _reduction(name: str) -> Rule:
    def rule(o: Operation) -> str:
        text = f"@.{name}({o.texts[0]}, {shape_text(o['axes'])})"
        # PyTorch and NumPy sum small integers in 64 bits.
        whole = name == "sum" and np.issubdtype(o.out.dtype, np.integer)
        return f"@.astype({text}, {dtype_text(o.out.dtype)})" if whole else text

    return rule


def is_reshape(name: str, old: Any, new: Any) -> bool:
    """Whether a primitive only makes another shape of the same numbers."""
    if name != "broadcast_in_dim":
        return name in ("reshape", "squeeze", "expand_dims")
    return [size for size in old.shape if size != 1] == [size for size in new.shape if size != 1]


def _broadcast(o: Operation) -> str:
    array, shape = o.texts[0], o.out.shape
    inner = [1] * len(shape)
    for axis, size in zip(o["broadcast_dimensions"], o.avals[0].shape, strict=True):
        inner[axis] = size
    if tuple(inner) != tuple(o.avals[0].shape):
        array = f"{array}.reshape({shape_text(inner)})"
    return array if tuple(inner) == shape else f"@.broadcast_to({array}, {shape_text(shape)})"


def _slice(o: Operation) -> str:
    strides = o["strides"] or (1,) * len(o.out.shape)
    rows = zip(o["start_indices"], o["limit_indices"], strides, o.avals[0].shape, strict=True)
    cuts = [
        ("" if not first else str(first))
        + ":"
        + ("" if last == size else str(last))
        + ("" if step == 1 else f":{step}")
        for first, last, step, size in rows
    ]
    while len(cuts) > 1 and cuts[-1] == ":":
        cuts.pop()
    return f"{o.texts[0]}[{', '.join(cuts)}]"


def _dot(o: Operation) -> str:
    (left, right), (batch, other) = o["dimension_numbers"]
    x, y = o.texts
    first, second = (len(aval.shape) for aval in o.avals)
    stacked = tuple(range(first - 2))
    if first == second >= 2 and tuple(batch) == tuple(other) == stacked and len(left) == 1:
        x = x if left[0] == first - 1 else f"{x}.mT"
        y = y if right[0] == first - 2 else f"{y}.mT"
        return f"({x} @ {y})"
    letters = "abcdefghijklmnopqrstuvwxyz"
    one, two = list(letters[:first]), list(letters[first : first + second])
    for i, j in [*zip(left, right, strict=True), *zip(batch, other, strict=True)]:
        two[j] = one[i]
    out = [one[i] for i in batch]
    out += [letter for i, letter in enumerate(one) if i not in (*left, *batch)]
    out += [letter for j, letter in enumerate(two) if j not in (*right, *other)]
    return f'@.einsum("{"".join(one)},{"".join(two)}->{"".join(out)}", {x}, {y})'


def _select(o: Operation) -> str:
    which, no, yes = o.texts
    return f"@.where({which}, {yes}, {no})"


def _power_of(o: Operation) -> str:
    """Returns a power, whose exponent may be an integer, in the precision of the base."""
    base, exponent = o.texts
    base = f"({base})" if base.startswith("-") else base
    if o.avals[1].dtype != o.out.dtype and not is_number(exponent):
        exponent = f"@.astype({exponent}, {dtype_text(o.out.dtype)})"
    return f"({base} ** {exponent})"


def _power(o: Operation) -> str:
    if o["y"] >= 0:
        return f"({o.texts[0]} ** {o['y']})"
    return f"(1 / {o.texts[0]} ** {-o['y']})"


def _round(o: Operation) -> str:
    if o["rounding_method"] != jax.lax.RoundingMethod.TO_NEAREST_EVEN:
        raise untranslated("round of 0.5 away from zero")
    return f"@.round({o.texts[0]})"


def _cumulated(name: str) -> Rule:
    def rule(o: Operation) -> str:
        if o["reverse"]:
            raise untranslated(f"{name}(reverse=True)")
        return f"@.{name}({o.texts[0]}, {o['axis']})"

    return rule


def _divide(o: Operation) -> str:
    if np.issubdtype(o.out.dtype, np.integer):
        raise untranslated("div of integers")
    return f"({o.texts[0]} / {o.texts[1]})"


def neighbours(params: dict[str, Any], operands: Any) -> range | None:
    """Returns which rows are gathered, if they are known and follow one another."""
    array, indices = operands
    known = indices.known
    if known is None or known.shape[-1:] != (1,) or not known.size or known.ndim > 2:
        return None
    rows = range(int(known.flat[0]), int(known.flat[-1]) + 1)
    whole = tuple(params["slice_sizes"]) == (1, *array.aval.shape[1:])
    follow = len(rows) == known.size and (known[..., 0] == np.asarray(rows)).all()
    collapsed = params["dimension_numbers"].collapsed_slice_dims == (0,)
    return rows if whole and follow and collapsed and rows.stop <= array.aval.shape[0] else None


def _gather(o: Operation) -> str:
    """Indexing of one axis in front, as `array[indices]` is."""
    numbers, sizes, (array, indices) = o["dimension_numbers"], o["slice_sizes"], o.avals
    offsets = tuple(range(len(o.out.shape) - len(array.shape) + 1, len(o.out.shape)))
    plain = (
        numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and numbers.offset_dims == offsets
        and not numbers.operand_batching_dims
        and tuple(sizes[1:]) == tuple(array.shape[1:])
    )
    if not plain:
        raise untranslated("gather of another kind than array[indices]")
    where = f"{o.texts[1]}[..., 0]" if len(indices.shape) else o.texts[1]
    return f"{o.texts[0]}[@.clip({where}, 0, {array.shape[0] - 1})]"


def _dynamic_slice(o: Operation) -> str:
    """Returns a slice that begins at numbers, or at scalars, which are kept within the array."""
    cuts = []
    for first, size, whole in zip(o.texts[1:], o["slice_sizes"], o.avals[0].shape, strict=True):
        if size == whole:
            cuts.append(":")
        elif is_number(first):
            start = min(max(int(first), 0), whole - size)
            cuts.append(f"{start}:{start + size}")
        elif first.startswith("k"):
            cuts.append(f"{first}:{first} + {size}")
        elif size == 1:
            cuts.append(f"@.clip({first}, 0, {whole - 1}).reshape((1,))")
        else:
            raise untranslated("dynamic_slice of more than one")
    if sum("reshape" in cut for cut in cuts) > 1:
        raise untranslated("dynamic_slice along several axes")
    return f"{o.texts[0]}[{', '.join(cuts)}]"


def number_text(known: np.ndarray) -> str:
    """Returns the one number of an array as source, in the digits of its dtype."""
    value = known.flat[0]
    if known.dtype.kind in "biu":
        return str(value.item())
    # The largest number of a precision, in its few digits, would be more than that.
    short = known.dtype.itemsize in (4, 8) and abs(value) < 1e38
    text = str(value if short else float(value))
    return text.replace("inf", "math.inf").replace("nan", "math.nan")


# What may be a view of its operand.
VIEWS = {"broadcast_in_dim", "dynamic_slice", "gather", "reshape", "slice", "transpose"}
# In the place of an operand that nothing else reads, if there are many numbers: half the traffic.
IN_PLACE = {"add": "add_", "mul": "mul_", "sub": "sub_", "div": "div_", "neg": "neg_"}
IN_PLACE |= {name: f"{name}_" for name in ("abs", "exp", "log", "rsqrt", "sqrt", "square", "tanh")}
IN_PLACE |= {"logistic": "sigmoid_", "max": "clamp_min_", "min": "clamp_max_"}
MANY = 4096


def in_place(name: str, texts: Sequence[str], which: int) -> str | None:
    """Returns an expression that writes its result into one of its operands, if there is one."""
    if name == "addcmul" and not which:
        return _add_product(f"{texts[0]}.add_(", f"{texts[0]}.addcmul_(", *texts[1:])
    if name not in IN_PLACE or (name == "div" and which) or len(texts) > 2:
        return None
    others = [text for i, text in enumerate(texts) if i != which]
    if name in ("max", "min") and not is_number(others[0]):
        return None
    if name == "sub" and which:
        return f"{texts[1]}.neg_().add_({others[0]})"
    return f"{texts[which]}.{IN_PLACE[name]}({', '.join(others)})"


def _add_product(scaled: str, general: str, x: str, y: str) -> str:
    """Returns a call that adds a product in one pass over memory."""
    x, y = (y, x) if is_number(x) else (x, y)
    return f"{scaled}{x}, alpha={y})" if is_number(y) else f"{general}{x}, {y})"


RULES: dict[str, Rule] = {
    # Of PyTorch alone.
    "addcmul": lambda o: _add_product(
        f"@.add({o.texts[0]}, ", f"@.addcmul({o.texts[0]}, ", *o.texts[1:]
    ),
    "sign": lambda o: "@.where({0} == {0}, @.sign({0}), {0})".format(*o.texts),  # PyTorch: 0
    **{
        name: _call(name)
        for name in (
            *("abs", "acos", "acosh", "asin", "asinh", "atan", "atanh", "ceil", "cos", "cosh"),
            *("erf", "erfc", "exp", "exp2", "expm1", "floor", "log", "log1p", "rsqrt"),
            *("sin", "sinh", "sqrt", "square", "tan", "tanh"),
        )
    },
    **{
        name: _infix(symbol)
        for name, symbol in {
            "add": "+",
            "sub": "-",
            "mul": "*",
            "lt": "<",
            "le": "<=",
            "gt": ">",
            "ge": ">=",
            "eq": "==",
            "ne": "!=",
            "and": "&",
            "or": "|",
            "xor": "^",
        }.items()
    },
    **{
        f"reduce_{name}": _reduction(other)
        for name, other in {
            "sum": "sum",
            "max": "amax",
            "min": "amin",
            "and": "all",
            "or": "any",
        }.items()
    },
    "reshape": lambda o: f"{o.texts[0]}.reshape({shape_text(o.out.shape)})",
    "add_any": _infix("+"),
    "broadcast_in_dim": _broadcast,
    "clamp": lambda o: f"@.clip({o.texts[1]}, {o.texts[0]}, {o.texts[2]})",
    "concatenate": lambda o: f"@.concatenate([{', '.join(o.texts)}], {o['dimension']})",
    "convert_element_type": lambda o: f"@.astype({o.texts[0]}, {dtype_text(o['new_dtype'])})",
    "div": _divide,
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "integer_pow": _power,
    "is_finite": _call("isfinite"),
    "lerp": _call("lerp"),
    "logistic": _call("sigmoid"),
    "max": _bound("maximum", "min"),
    "min": _bound("minimum", "max"),
    "pow": _power_of,
    "rem": _call("fmod"),
    "round": _round,
    **{name: _cumulated(name) for name in ("cumprod", "cumsum")},
    "neg": lambda o: f"(-{o.texts[0]})",
    "not": lambda o: f"(~{o.texts[0]})",
    "select_n": _select,
    "slice": _slice,
    "stack": lambda o: f"@.stack([{', '.join(o.texts)}], {o.params.get('axis', 0)})",
    "transpose": lambda o: f"@.permute({o.texts[0]}, {shape_text(o['permutation'])})",
}
# What only hands on its operands.
IDENTITIES = {"copy", "device_put", "optimization_barrier", "reduce_precision"}
IDENTITIES |= {"sharding_constraint", "stop_gradient"}
# Elementwise: a number may stand for an array that is the same everywhere.
ELEMENTWISE = {"add", "sub", "mul", "div", "pow", "rem", "max", "min", "lt", "le", "gt", "ge", "eq"}
ELEMENTWISE |= {"ne", "select_n", "clamp", "and", "or", "xor", "add_any"}
# Other operands that may be numbers: where slices begin, the weight of an average, factors.
NUMBERS = {("dynamic_slice", i) for i in range(1, 9)}
NUMBERS |= {("lerp", 2), ("addcmul", 1), ("addcmul", 2)}
# Which numbers change nothing.
NEUTRAL = {"add": 0, "sub": 0, "mul": 1, "div": 1}
