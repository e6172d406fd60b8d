"""A learned optimizer as one Python file that needs neither lopt nor, for PyTorch, JAX.

A coordinatewise rule is traced once for each rank, with sizes that are not known, so that the file
serves tensors of any shape. Axes are in the order of their sizes there, which is all that such a
rule knows of them. Any other optimizer is traced for parameters of given shapes.
"""

import itertools
import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.export import symbolic_shape

from lopt.bridges import operations
from lopt.bridges.translate import Program, translate
from lopt.core.coordinatewise import Coordinatewise
from lopt.core.learned import AbstractLearnedOptimizer

RANKS = (1, 2, 3, 4)
LARGEST = 100_000  # numbers in a file

HEAD = '''"""{title}: a learned optimizer in one file, exported by lopt {version}.

    {usage}

It serves {serves}. Arithmetic is float32.
"""

import math

{imports}

CONSTANTS = [
{constants}
]


{programs}


PROGRAMS = {{
{rows}
}}


def parts_of(tensors):
    """What is worked on together."""
    return {parts}


def axes_of(x):
    """The axes of a tensor in the order in which the rule sees them."""
    return {axes}


'''

TORCH = '''def seen(x):
    """A tensor as the rule sees it."""
    x = x.float().permute(axes_of(x))
    return x.reshape(x.shape or (1,))


class {name}(torch.optim.Optimizer):
    """Updates are multiplied by `lr`; `weight_decay` is decoupled."""

    def __init__(self, params, lr=1.0, weight_decay=0.0):
        super().__init__(params, {{"lr": lr, "weight_decay": weight_decay}})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for part in parts_of([p for p in group["params"] if p.grad is not None]):
                self.move(part, group["lr"], group["weight_decay"])
        return loss

    def move(self, params, lr, weight_decay):
        begin, update, used, types = PROGRAMS[{key}]
        constants = [CONSTANTS[i].to(params[0].device) for i in used]
        tensors, state = [seen(p) for p in params], self.state[params[0]]
        if not state:
            state.update((str(i), x) for i, x in enumerate(begin(constants, tensors)))
        # `load_state_dict` gives all state the type of the parameter.
        old = [x.to(t) for x, t in zip(state.values(), types)]
        found = update(constants, [*(seen(p.grad) for p in params), *old, *tensors])
        state.update(zip(list(state), found[len(params) :]))
        for p, u in zip(params, found):
            axes = axes_of(p)
            u = u.reshape([p.shape[i] for i in axes])
            u = u.permute(sorted(range(len(axes)), key=axes.__getitem__))
            p.add_((u.to(p.dtype) - weight_decay * p) * lr)
'''

OPTAX = '''def lerp(a, b, w):
    """The step of a moving average."""
    return a + w * (b - a)


def seen(x):
    """A tensor as the rule sees it."""
    x = jnp.permute_dims(jnp.asarray(x, jnp.float32), axes_of(x))
    return x.reshape(x.shape or (1,))


def {name}(learning_rate=1.0, weight_decay=0.0):
    """Returns an Optax optimizer, which needs params; decay is decoupled."""

    def programs(part):
        begin, update, used, _ = PROGRAMS[{key}]
        return begin, update, [CONSTANTS[i] for i in used]

    def init(params):
        states = []
        for part in parts_of(jax.tree.leaves(params)):
            begin, _, constants = programs(part)
            states.append(begin(constants, [seen(p) for p in part]))
        return states

    def update(grads, states, params):
        leaves, structure = jax.tree.flatten(params)
        slopes, updates, new = structure.flatten_up_to(grads), [], []
        for part, own, state in zip(parts_of(leaves), parts_of(slopes), states):
            _, step, constants = programs(part)
            found = step(constants, [*map(seen, own), *state, *map(seen, part)])
            new.append(found[len(part) :])
            for p, u in zip(part, found):
                axes = axes_of(p)
                u = u.reshape([p.shape[i] for i in axes])
                u = jnp.permute_dims(u, sorted(range(len(axes)), key=axes.__getitem__))
                updates.append(((u - weight_decay * p) * learning_rate).astype(p.dtype))
        return structure.unflatten(updates), new

    return optax.GradientTransformation(init, update)
'''

IMPORTS = {
    "torch": "import torch",
    "optax": "import jax\nimport jax.numpy as jnp\nimport numpy as np\nimport optax",
}


def export(
    optimizer: AbstractLearnedOptimizer | optax.GradientTransformation,
    theta: Any = None,
    *,
    to: str = "torch",
    num_steps: int | None = None,
    shapes: Sequence[tuple[int, ...]] = (),
    title: str = "",
    name: str = "LearnedOptimizer",
) -> str:
    """Returns a Python file with an optimizer of PyTorch, or of Optax.

    Args:
        optimizer: a coordinatewise learned optimizer, such as one with a symbolic rule; any other,
            or one of Optax, if shapes are given.
        theta: its weights.
        to: "torch" or "optax".
        num_steps: the length of the run, if it needs that.
        shapes: of all parameters in order, in the layout of `to`; by default the file serves any.
        title: its first words.
        name: of its class or function.

    Raises:
        ValueError: if it cannot be exported so.
    """
    if to not in ("torch", "optax"):
        raise ValueError(f"export(to={to!r}) must be 'torch' or 'optax'.")
    if not shapes and not isinstance(optimizer, Coordinatewise):
        raise ValueError(
            f"{type(optimizer).__name__} is not coordinatewise: its step of a tensor may depend on "
            "the others, so give the shapes of all, such as 64x32 32."
        )
    learned = isinstance(optimizer, AbstractLearnedOptimizer)
    made: Any = optimizer.optimizer(theta, num_steps) if learned else optimizer
    made = optax.with_extra_args_support(made)
    flips = to == "torch" and bool(shapes)
    file = _File(operations.TORCH if to == "torch" else operations.JAX)
    with jax.enable_x64(False):
        for key, tree, sizes in _cases(shapes, flips):
            file.add(key, made, tree, sizes)
    serves, axes = f"tensors of up to {RANKS[-1]} axes", "[*range(x.ndim)]"
    if to == "torch":  # outputs are first in torch.nn
        axes = "[*range(2, x.ndim), 1, 0] if x.ndim > 1 else [*range(x.ndim)]"
    if shapes:
        serves = f"one group of parameters, all with gradients, of {[*map(tuple, shapes)]}"
    else:
        axes = f"sorted({axes}, key=x.shape.__getitem__)"
    return file.text(
        to,
        title=title or type(optimizer).__name__,
        name=name,
        usage=f"{name}({'model.parameters()' if to == 'torch' else ''})",
        serves=serves,
        axes=axes,
        parts="[tensors] if tensors else []" if shapes else "[[x] for x in tensors]",
        key="0" if shapes else f"{'params' if to == 'torch' else 'part'}[0].ndim or 1",
    )


def _cases(shapes: Sequence[tuple[int, ...]], flips: bool) -> list[tuple[int, Any, str]]:
    """Returns what is traced: a key, params, and the names of sizes that are not known."""
    if shapes:
        axes = [inputs_first(len(s)) if flips else range(len(s)) for s in shapes]
        seen = [tuple(s[a] for a in order) or (1,) for s, order in zip(shapes, axes, strict=True)]
        return [(0, [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in seen], "")]
    cases = []
    for rank in RANKS:
        names = "abcd"[:rank]
        order = [f"{i} <= {j}" for i, j in itertools.pairwise(names)]
        # Small tensors are not cut, and what holds for them holds for all.
        sizes = symbolic_shape(", ".join(names), constraints=[*order, f"{'*'.join(names)} <= 1024"])
        cases.append((rank, [jax.ShapeDtypeStruct(sizes, jnp.float32)], ", ".join(names)))
    return cases


def inputs_first(rank: int) -> tuple[int, ...]:
    """Returns the axes of PyTorch's weights, outputs first, in the order that rules see."""
    return (*range(2, rank), 1, 0) if rank > 1 else tuple(range(rank))


class _File:
    """Programs, and the constants that they share."""

    def __init__(self, language: operations.Language) -> None:
        self.language = language
        self.constants: dict[Any, np.ndarray] = {}
        self.functions: list[str] = []
        self.rows: list[str] = []

    def add(self, key: int, made: Any, tree: Any, sizes: str) -> None:
        """Adds the programs that begin and update such params."""
        state = jax.eval_shape(made.init, tree)
        loss = jax.ShapeDtypeStruct((), jnp.float32)
        begin, _ = translate(made.init, tree, language=self.language)
        step, _ = translate(
            lambda grads, state, params, loss: made.update(grads, state, params, value=loss),
            *(tree, state, tree, loss),
            language=self.language,
            slabs=math.inf,
        )
        if step.reads[-1]:
            raise ValueError("A rule that needs the loss cannot be exported as a file.")
        begun, moved = self.place(begin), self.place(step)
        used = [*dict.fromkeys(begun + moved)]
        self.functions.append(_function(f"begin_{key}", begin, begun, used, sizes))
        text = _function(f"update_{key}", step, moved, used, sizes)
        # The loss is read by nothing.
        self.functions.append(text.replace(f", x{len(step.reads) - 1}] = inputs", "] = inputs"))
        dtypes = [operations.dtype_text(leaf.dtype) for leaf in jax.tree.leaves(state)]
        types = self.language.render(f"[{', '.join(dtypes)}]")
        self.rows.append(f"    {key}: (begin_{key}, update_{key}, {used}, {types}),")

    def place(self, program: Program) -> list[int]:
        """Returns the places of a program's constants among all."""
        keys = [(a.dtype, a.shape, a.tobytes()) for a in program.constants]
        self.constants |= zip(keys, program.constants, strict=True)
        return [list(self.constants).index(key) for key in keys]

    def text(self, to: str, **words: str) -> str:
        """Returns the file."""
        if sum(array.size for array in self.constants.values()) > LARGEST:
            raise ValueError(f"Its weights are more than {LARGEST} numbers, too many for a file.")
        make = "torch.tensor" if to == "torch" else "np.array"
        constants = []
        for array in self.constants.values():
            how = f"dtype={operations.dtype_text(array.dtype)}"
            shape = operations.shape_text(array.shape)
            constants.append(f"    {make}({_numbers(array)}, {how}).reshape({shape}),")
        return (HEAD + (TORCH if to == "torch" else OPTAX)).format(
            version=version("lopt"),
            imports=IMPORTS[to],
            constants=self.language.render("\n".join(constants)),
            programs="\n\n\n".join(self.functions),
            rows="\n".join(self.rows),
            **words,
        )


def _function(name: str, program: Program, own: list[int], used: list[int], sizes: str) -> str:
    """Returns a program as a function that is given all constants that are used."""
    text = program.source.rstrip().replace("def program(", f"def {name}(")
    places = [used.index(i) for i in own]
    if places != list(range(len(used))):
        text = text.replace("] = constants", f"] = [constants[i] for i in {places}]")
    return text.replace("] = inputs", f"] = inputs\n    [{sizes}] = x0.shape") if sizes else text


def _numbers(array: np.ndarray) -> str:
    """Returns the numbers of an array in the digits of its precision."""
    return "[" + ", ".join(operations.number_text(x) for x in array.reshape(-1, 1)) + "]"
