"""The update of a group of parameters as a program of PyTorch, and what it keeps of each."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lopt.bridges import Program, translate


class GroupProgram:
    """An update of some parameters of a group, with the names of what it keeps of each."""

    def __init__(self, rule: Any, rows: tuple[int, ...]) -> None:
        # A dict is flattened in the order of its keys.
        self.rows = sorted(rows, key=rule.keys.__getitem__)
        self.axes, self.own_decay = [rule.axes[i] for i in self.rows], rule.own_decay
        self.back = [sorted(range(len(axes)), key=axes.__getitem__) for axes in self.axes]
        self.device, tree = rule.device, {rule.keys[i]: rule.shapes[i] for i in rows}
        dtype = jnp.promote_types(jnp.float32, jnp.result_type(*tree.values()))
        number = jax.ShapeDtypeStruct((), dtype)
        self.number = getattr(torch, dtype.name)

        def update(grads: Any, state: Any, params: Any, loss: Any, decay: Any) -> Any:
            return rule.transformation(decay).update(grads, state, params, value=loss)

        program, state = translate(lambda params: rule.transformation(0.0).init(params), tree)
        self.init = _Function(program, self.device)
        given = tree, state, tree, number, number
        program, _ = translate(update, *given)
        # Compilers unroll loops over slabs: narrow ones only where that is short, and not for GPUs.
        wide, is_cpu = program, self.device.type == "cpu"
        for slabs in (4.0, 128.0):
            lines = wide.source.splitlines()
            size = len(lines) * max(line.count("), (") + 1 for line in lines)
            if "    for " not in wide.source or (is_cpu and size < 4_000):
                break
            wide = translate(update, *given, slabs=slabs)[0]
        self.update, self.wide = (_Function(each, self.device) for each in (program, wide))
        self.reads_loss = program.reads[-2]
        leaves = jax.tree_util.tree_leaves_with_path(state)
        self.places = [_place(path, rule.keys) for path, _ in leaves]

    def seen(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Returns tensors with the axes that the rule sees."""
        return [tensor.permute(axes) for tensor, axes in zip(tensors, self.axes, strict=True)]

    @torch.no_grad()
    def begin(self, params: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Returns initial states."""
        states: list[dict[str, torch.Tensor]] = [{} for _ in params]
        found = self.init(self.seen([params[i] for i in self.rows]))
        for (i, name), tensor in zip(self.places, found, strict=True):
            states[i][name] = tensor.clone()
        return states

    def step(self, group: dict[str, Any], states: Any, loss: Any) -> None:
        """Changes parameters and states in place."""
        if self.reads_loss and loss is None:
            raise ValueError(
                f"{group['design']} needs the loss; try optimizer.step(loss=loss), or a closure "
                "that returns it."
            )
        params = [group["params"][i] for i in self.rows]
        for p in params:
            if p.grad.is_sparse:
                raise ValueError(
                    f"LearnedOptimizer.step: the gradient of a parameter of shape {list(p.shape)} "
                    "is sparse; make it dense, as nn.Embedding(sparse=False) does."
                )
        grads = [p.grad.to(p.dtype) for p in params]
        state = [states[group["params"][i]][name] for i, name in self.places]
        numbers = 0.0 if loss is None else loss, group["weight_decay"], group["lr"]
        loss, decay, rate = map(self.scalar, numbers)
        is_wide = torch.compiler.is_compiling() or self.device.type != "cpu"
        run = self.wide if is_wide else self.update
        found = run([*self.seen(grads), *state, *self.seen(params), loss, decay])
        steps: Any = [u.permute(back) for u, back in zip(found, self.back, strict=False)]
        if not self.own_decay and group["weight_decay"]:
            steps = torch._foreach_sub(steps, torch._foreach_mul(params, decay))
        # An update may be what the state was, and the state what parameters were.
        steps = torch._foreach_mul(steps, rate)
        # One by one: compiled by PyTorch 2.13, torch._foreach_copy_ writes before all is read.
        for old, new in zip(state, found[len(params) :], strict=True):
            old.copy_(new)
        for parameter, change in zip(params, steps, strict=True):
            parameter.add_(change)

    def scalar(self, number: Any) -> torch.Tensor:
        """Returns a number as an input."""
        if isinstance(number, torch.Tensor):
            return number.detach().reshape(()).to(self.device, self.number)
        # Unlike torch.full, a product is not compiled again for every number.
        return torch.ones((), dtype=self.number, device=self.device) * number


class _Function:
    """What a program computes on a device. It is pickled as its source."""

    def __init__(self, program: Program, device: torch.device) -> None:
        self.program, self.device = program, device
        self.function = program.function(torch=torch, math=math)
        self.constants = [_tensor(array).to(device) for array in program.constants]

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return self.function(self.constants, inputs)

    def __reduce__(self) -> Any:
        return _Function, (self.program, self.device)


def _place(path: Any, keys: list[str]) -> tuple[int, str]:
    """Returns the parameter that a leaf of the state belongs to, and its name there.

    State that all parameters of the group share is kept with the first.
    """
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    for at, key in enumerate(path):
        if isinstance(key, jax.tree_util.DictKey) and names[at] in keys:
            return keys.index(names[at]), ".".join(names[:at] + names[at + 1 :])
    return 0, ".".join(["shared", *names])


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Returns an array as a tensor; NumPy's bfloat16 is unknown to PyTorch."""
    if array.dtype.name == "bfloat16":
        return torch.tensor(array.astype(np.float32)).to(torch.bfloat16)
    return torch.tensor(array)
