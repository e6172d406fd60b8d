"""A learned optimizer as a `torch.optim.Optimizer`. JAX runs when it is made, never in a step."""

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import nn

from lopt.bridges.translate import translate
from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Theta
from lopt.experiment.pretrained import RATE, pretrained
from lopt.experiment.runs.storage import load, pretrained_file, pretrained_names
from lopt.torch import layout as layouts

OWN = ("optimizer", "theta", "num_steps", "layout", "keys", "axes")


class LearnedOptimizer(torch.optim.Optimizer):
    """A learned optimizer, pretrained or one's own, or any optimizer of Optax.

        optimizer = lopt.torch.LearnedOptimizer(model.parameters(), "lopt-1", num_steps=2_000)
        loss.backward()
        optimizer.step()

    Its updates are those of JAX to rounding. State has the precision of the rule, at least float32;
    bfloat16 parameters are updated in theirs. Each group of parameters is a run of its own, as in
    `optax.multi_transform`, and may have `lr`, `weight_decay`, `optimizer`, `theta`, `num_steps`
    and `layout` of its own. Parameters without a gradient are left out of a step.

    Args:
        params: parameters, named parameters, or groups of them, as for any optimizer of PyTorch.
        optimizer: a name of `lopt.pretrained_names()`, the path of a run or of weights that
            `lopt.save` wrote, a learned optimizer, or an optimizer of Optax.
        theta: the weights of a learned optimizer; initial ones by default.
        lr: multiplies updates; schedulers may change it. 1 by default. A rule that has a learned
            schedule, such as lopt-1, needs a rate (such as 0.05) where it is not told `num_steps`.
        weight_decay: decoupled, per step and unit of the rate; None for what is stored with a
            pretrained optimizer (0.06 for lopt-1, matrices only), else none.
        num_steps: the length of the run, for rules that need it.
        layout: "torch": weights of `nn.Linear` and convolutions have outputs first. What they
            belong to is told by names and ranks; `for_module` knows it. "jax": as they are.

    Attributes:
        needs: what the rules need: "loss", "num_steps".

    Raises:
        ValueError: if parameters are not real floats, sparse or on the meta device, a rule needs
            what it is not given, or weights are of another design.
    """

    def __init__(
        self,
        params: Iterable[Any],
        optimizer: str | Path | AbstractLearnedOptimizer | optax.GradientTransformation = "lopt-1",
        theta: Theta | None = None,
        *,
        lr: float | None = None,
        weight_decay: float | None = None,
        num_steps: int | None = None,
        layout: str = "torch",
    ) -> None:
        if layout not in ("torch", "jax"):
            raise ValueError(f"LearnedOptimizer(layout={layout!r}) must be 'torch' or 'jax'.")
        self._given = {"optimizer": optimizer, "theta": theta, "num_steps": num_steps}
        self._given |= {"layout": layout, "keys": None, "axes": None}
        self._rules: list[_Rule] = []
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @classmethod
    def for_module(cls, model: nn.Module, *arguments: Any, **options: Any) -> "LearnedOptimizer":
        """Returns one for the trainable parameters of a module, whose types tell their axes."""
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        axes, keys = layouts.axes_of(model), [layouts.key_of(name, model) for name, _ in named]
        group = {"params": named, "keys": keys, "axes": [axes[name] for name, _ in named]}
        return cls([group], *arguments, **options)

    @property
    def needs(self) -> frozenset[str]:
        """What the rules need."""
        return frozenset().union(*(rule.needs for rule in self._rules))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, which may have any argument of `LearnedOptimizer` of its own."""
        own = {name: param_group.pop(name, self._given[name]) for name in OWN}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            rule = _Rule(group, **own)
        except BaseException:
            self.param_groups.pop()
            raise
        group |= {"lr": rule.rate, "weight_decay": rule.decay, "design": rule.design}
        self._rules.append(rule)
        for parameter, state in zip(group["params"], rule.begin(group["params"]), strict=True):
            self.state[parameter] = state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, loss: Any = None) -> Any:
        """Takes a step.

        Args:
            closure: computes gradients, and returns the loss.
            loss: the loss, for rules that need it, where there is no closure.

        Returns:
            The loss, if there is one.
        """
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, rule in zip(self.param_groups, self._rules, strict=True):
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                present = tuple(p.grad is not None for p in group["params"])
                rule.step(group, present, params, [self.state[p] for p in params], loss)
        return loss

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, in the precision of the state.

        Raises:
            ValueError: if it is of another design, layout or shape.
        """
        own = [self.state[p] for group in self.param_groups for p in group["params"]]
        groups = state_dict["param_groups"]
        for rule, group in zip(self._rules, groups, strict=False):
            if group.get("design") != rule.design:
                raise ValueError(
                    f"load_state_dict: the state is that of {group.get('design')}, and this is "
                    f"{rule.design}; make the optimizer with the arguments of the saved one."
                )
        saved = [state_dict["state"].get(i, {}) for group in groups for i in group["params"]]
        for mine, other in zip(own, saved, strict=False):
            if shapes(mine) != shapes(other):
                raise ValueError(
                    f"load_state_dict: the state of a parameter has the shapes {shapes(other)}, "
                    f"expected {shapes(mine)}; load it into an optimizer of the same parameters."
                )
        super().load_state_dict(state_dict)
        for mine, other in zip(own, saved, strict=True):
            for name, tensor in mine.items():
                tensor.copy_(other[name])
        params = [p for group in self.param_groups for p in group["params"]]
        self.state.update(zip(params, own, strict=True))


def shapes(state: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """Returns the shape of each tensor."""
    return {name: list(tensor.shape) for name, tensor in sorted(state.items())}


class _Rule:
    """The programs of one group: one for each set of parameters that have gradients."""

    def __init__(
        self,
        group: dict[str, Any],
        optimizer: Any,
        theta: Theta | None,
        num_steps: int | None,
        layout: str,
        keys: list[str] | None,
        axes: list[layouts.Axes] | None,
    ) -> None:
        params = group["params"]
        names = group.get("param_names") or [str(i) for i in range(len(params))]
        for name, parameter in zip(names, params, strict=True):
            _check(name, parameter)
        if len({parameter.device for parameter in params}) > 1:
            raise ValueError(
                "LearnedOptimizer was given a group on several devices; make a group for each."
            )
        self.layout, self.keys = layout, keys or names
        by_rank = [layouts.by_rank(*row, layout) for row in zip(names, params, strict=True)]
        self.axes = by_rank if axes is None or layout == "jax" else axes
        self.optimizer, self.theta, self.num_steps = optimizer, theta, num_steps
        self.precise = any(parameter.dtype == torch.float64 for parameter in params)
        self.rate, self.decay = group["lr"], group["weight_decay"]
        with self.jax():
            self.read()
        self.programs: dict[tuple[bool, ...], _Program] = {}
        everything = self.program((True,) * len(params), params)
        self.needs = {"loss"} if everything.reads_loss else set()
        if isinstance(self.learned, AbstractLearnedOptimizer) and self.learned.needs_num_steps:
            self.needs |= {"num_steps"}

    def jax(self) -> Any:
        """Returns the context in which JAX has the precision of the parameters."""
        return jax.enable_x64(True) if self.precise else contextlib.nullcontext()

    def read(self) -> None:
        """Finds out what the optimizer is, its rate and decay."""
        optimizer, theta = self.optimizer, self.theta
        self.named = isinstance(optimizer, str) and optimizer in pretrained_names()
        if self.named:
            self.learned, self.theta = load(pretrained_file(optimizer))
        elif isinstance(optimizer, str | Path):
            self.learned, self.theta = load(optimizer)
        else:
            self.learned = optimizer
            if theta is None and isinstance(optimizer, AbstractLearnedOptimizer):
                self.theta = optimizer.init(jax.random.key(0))
        self.own_decay = hasattr(self.learned, "weight_decay")
        if self.decay is None:
            self.decay = float(getattr(self.learned, "weight_decay", 0.0))
        scheduled = hasattr(self.learned, "learning_rate") and self.learned.learning_rate is None
        if scheduled and self.num_steps is None and self.rate is None:
            raise ValueError(
                f"LearnedOptimizer({optimizer!r:.60}) needs the length of the run or a rate; try "
                f"num_steps=1000, or lr={RATE}."
            )
        self.constant = scheduled and self.num_steps is None
        self.rate = 1.0 if self.rate is None else self.rate
        weights = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(self.theta))
        digest = hashlib.sha256(weights + repr(self.axes).encode()).hexdigest()[:8]
        name = optimizer if self.named else type(self.learned).__name__
        self.design = f"{name} ({digest}, layout={self.layout!r})"

    def transformation(self, decay: Any) -> optax.GradientTransformationExtraArgs:
        """Returns the Optax optimizer, whose rate is one where ours stands for it."""
        rate: dict[str, Any] = {"learning_rate": 1.0} if self.constant else {}
        with jax.ensure_compile_time_eval():  # files are read, also while it is traced
            if self.named:
                options = {**rate, "weight_decay": decay}
                return pretrained(self.optimizer, self.num_steps, **options)
            if not isinstance(self.learned, AbstractLearnedOptimizer):
                return optax.with_extra_args_support(self.learned)
            changes = rate | ({"weight_decay": decay} if self.own_decay else {})
            learned = dataclasses.replace(self.learned, **changes)
            return learned.optimizer(self.theta, self.num_steps)

    def program(self, present: tuple[bool, ...], params: list[torch.Tensor]) -> "_Program":
        """Returns the program for these parameters."""
        if present not in self.programs:
            self.programs[present] = self.translated(present, params)
        return self.programs[present]

    @torch._disable_dynamo
    def translated(self, present: tuple[bool, ...], params: list[torch.Tensor]) -> "_Program":
        """Returns the translation of an update."""
        rows = [i for i, there in enumerate(present) if there]
        axes = [self.axes[i] for i in rows]
        with self.jax():
            tree = {
                self.keys[i]: jax.ShapeDtypeStruct(
                    [tensor.shape[axis] for axis in order],
                    str(tensor.dtype).removeprefix("torch."),
                )
                for i, order, tensor in zip(rows, axes, params, strict=True)
            }
            return _Program(self, tree, [self.keys[i] for i in rows], axes, params[0].device)

    def begin(self, params: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Returns the state of each parameter before the first step."""
        return self.programs[(True,) * len(params)].begin(params)

    def step(
        self,
        group: dict[str, Any],
        present: tuple[bool, ...],
        params: list[torch.Tensor],
        states: list[dict[str, torch.Tensor]],
        loss: Any,
    ) -> None:
        """Changes parameters and states in place."""
        self.program(present, params).step(group, params, states, loss)


class _Program:
    """An update of some parameters, with the names of what it keeps of them."""

    def __init__(
        self, rule: _Rule, tree: Any, keys: list[str], axes: list[layouts.Axes], device: Any
    ) -> None:
        # A dict is flattened in the order of its keys.
        self.order = sorted(range(len(keys)), key=keys.__getitem__)
        self.axes, self.own_decay = axes, rule.own_decay
        dtype = jnp.promote_types(jnp.float32, jnp.result_type(*jax.tree.leaves(tree)))
        number = jax.ShapeDtypeStruct((), dtype)
        state = jax.eval_shape(lambda params: rule.transformation(0.0).init(params), tree)

        def init(params: Any) -> Any:
            return rule.transformation(0.0).init(params)

        def update(grads: Any, state: Any, params: Any, loss: Any, decay: Any) -> Any:
            return rule.transformation(decay).update(grads, state, params, value=loss)

        begin, _ = translate(init, tree)
        step, _ = translate(update, tree, state, tree, number, number)
        self.reads_loss, self.reads_decay = step.reads[-2:]
        paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
        # State that all parameters share is kept with the first.
        self.places = [_place(path, keys) for path in paths]
        self.number = getattr(torch, np.dtype(dtype).name)
        self.device = device
        self.begun, self.begun_with = _function(begin), _tensors(begin.constants, device)
        self.function, self.constants = _function(step), _tensors(step.constants, device)

    def begin(self, params: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        """Returns initial states."""
        states: list[dict[str, torch.Tensor]] = [{} for _ in params]
        with torch.no_grad():
            found = self.begun(self.begun_with, self.seen(params))
        for (i, name), tensor in zip(self.places, found, strict=True):
            states[i][name] = torch.as_tensor(tensor).clone()
        return states

    def seen(self, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """Returns tensors as the rule sees them: in its order, and with its axes."""
        return [tensors[i].permute(self.axes[i]) for i in self.order]

    def step(
        self,
        group: dict[str, Any],
        params: list[torch.Tensor],
        states: list[dict[str, torch.Tensor]],
        loss: Any,
    ) -> None:
        """Changes parameters and states in place."""
        if self.reads_loss and loss is None:
            raise ValueError(
                f"{group['design']} needs the loss; try optimizer.step(loss=loss), or a closure "
                "that returns it."
            )
        grads: list[Any] = [p.grad for p in params]
        for p, grad in zip(params, grads, strict=True):
            if grad.is_sparse:
                raise ValueError(
                    f"LearnedOptimizer.step: the gradient of a parameter of shape {list(p.shape)} "
                    "is sparse; make it dense, as nn.Embedding(sparse=False) does."
                )
        state = [states[i][name] for i, name in self.places]
        numbers = [self.scalar(x) for x in (loss, group["weight_decay"])]
        seen = self.seen([g.to(p.dtype) for g, p in zip(grads, params, strict=True)])
        found = self.function(self.constants, [*seen, *state, *self.seen(params), *numbers])
        updates, new = found[: len(params)], found[len(params) :]
        if state:
            torch._foreach_copy_(state, new)
        for i, update in zip(self.order, updates, strict=True):
            back = sorted(range(len(self.axes[i])), key=self.axes[i].__getitem__)
            update = update.permute(back)
            if not self.own_decay and group["weight_decay"]:
                update = update - group["weight_decay"] * params[i]
            params[i].add_(update * group["lr"])

    def scalar(self, number: Any) -> torch.Tensor:
        """Returns a number as an input."""
        if isinstance(number, torch.Tensor):
            return number.detach().reshape(()).to(self.device, self.number)
        return torch.full((), 0.0 if number is None else number, dtype=self.number).to(self.device)


def _check(name: str, tensor: torch.Tensor) -> None:
    """Refuses what no learned optimizer trains."""
    kinds = {
        str(tensor.dtype): not tensor.is_floating_point(),
        "sparse": tensor.layout != torch.strided,
        "on the meta device": tensor.is_meta,
    }
    for kind, wrong in kinds.items():
        if wrong:
            raise ValueError(
                f"LearnedOptimizer: the parameter {name} is {kind}; it trains dense, real floats "
                "on a device, so leave it out, or convert it first."
            )


def _place(path: Any, keys: list[str]) -> tuple[int, str]:
    """Returns the parameter that a leaf of the state belongs to, and its name there."""
    names = [jax.tree_util.keystr((key,), simple=True) for key in path]
    for at, key in enumerate(path):
        if isinstance(key, jax.tree_util.DictKey) and names[at] in keys:
            return keys.index(names[at]), ".".join(names[:at] + names[at + 1 :])
    return 0, ".".join(["shared", *names])


def _function(program: Any) -> Any:
    return program.function(torch=torch, math=math)


def _tensors(arrays: list[np.ndarray], device: Any) -> list[torch.Tensor]:
    """Returns arrays as tensors of a device."""
    return [
        torch.tensor(array.astype(np.float32)).to(device, torch.bfloat16)
        if array.dtype.name == "bfloat16"
        else torch.tensor(array).to(device)
        for array in arrays
    ]
