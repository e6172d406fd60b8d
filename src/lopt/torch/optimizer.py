"""A learned optimizer as a `torch.optim.Optimizer`. JAX runs when it is made, never in a step."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import torch
from torch import nn

from lopt.core.learned import AbstractLearnedOptimizer
from lopt.core.types import Theta
from lopt.experiment.pretrained import RATE, pretrained
from lopt.experiment.runs.storage import load, pretrained_file, pretrained_names
from lopt.learned import MuonMLP
from lopt.torch import layout as layouts
from lopt.torch.program import GroupProgram

FLOATS = {getattr(torch, n): n for n in ("float64", "float32", "float16", "bfloat16")}
# Arguments that a group may have of its own, besides those that schedulers see.
OWN = ("optimizer", "theta", "num_steps", "layout", "keys", "axes")


class LearnedOptimizer(torch.optim.Optimizer):
    """A learned optimizer, pretrained or one's own, or nearly any optimizer of Optax.

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
        lr: float | torch.Tensor | None = None,
        weight_decay: float | None = None,
        num_steps: int | None = None,
        layout: str = "torch",
    ) -> None:
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
        """What the rules need: "loss", "num_steps"."""
        return frozenset().union(*(rule.needs for rule in self._rules))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, which may have any argument of `LearnedOptimizer` of its own."""
        param_group = dict(param_group)  # it may be used again
        own = {name: param_group.pop(name, self._given[name]) for name in OWN}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            rule = _Rule(group, **own)
            rows = tuple(range(len(group["params"])))
            states = rule.program(rows).begin(group["params"]) if rows else []
        except BaseException:
            self.param_groups.pop()
            raise
        group |= {"lr": rule.rate, "weight_decay": rule.decay, "design": rule.design}
        self._rules.append(rule)
        self.state.update(zip(group["params"], states, strict=True))

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
            rows = tuple(i for i, p in enumerate(group["params"]) if p.grad is not None)
            if rows:
                rule.program(rows).step(group, self.state, loss)
        return loss

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` returned, in the precision of the state.

        Raises:
            ValueError: if it is of another design, layout or shape.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        own, groups = [self.state[p] for p in params], state_dict["param_groups"]
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
        # Which has rounded it to the precision of the parameters.
        for mine, other in zip(own, saved, strict=True):
            for name, tensor in mine.items():
                tensor.copy_(other[name])
        self.state.update(zip(params, own, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_given": self._given, "_rules": self._rules}


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
        params, rate, decay = group["params"], group["lr"], group["weight_decay"]
        if layout not in ("torch", "jax"):
            raise ValueError(f"LearnedOptimizer(layout={layout!r}) must be 'torch' or 'jax'.")
        for field, number in (("lr", rate), ("weight_decay", decay)):
            if number is not None and not number >= 0:
                raise ValueError(f"LearnedOptimizer({field}={number}) must be at least 0; try 0.1.")
        if theta is not None and isinstance(optimizer, str | Path):
            raise ValueError(
                f"LearnedOptimizer({optimizer!r}, theta) has weights already; leave theta out, or "
                "give the learned optimizer that lopt.load returns."
            )
        names = group.get("param_names") or [str(i) for i in range(len(params))]
        for name, parameter in zip(names, params, strict=True):
            _check(name, parameter)
        if len({parameter.device for parameter in params}) > 1:
            raise ValueError(
                "LearnedOptimizer was given a group on several devices; make a group for each."
            )
        by_rank = [layouts.by_rank(*row, layout) for row in zip(names, params, strict=True)]
        self.axes = by_rank if axes is None or layout == "jax" else axes
        self.keys, self.optimizer, self.num_steps = keys or names, optimizer, num_steps
        # JAX has the precision of the parameters.
        precise = any(parameter.dtype == torch.float64 for parameter in params)
        self.jax = functools.partial(jax.enable_x64, True) if precise else contextlib.nullcontext
        self.device = params[0].device if params else torch.device("cpu")
        self.shapes = [
            jax.ShapeDtypeStruct([p.shape[axis] for axis in axes], FLOATS[p.dtype])
            for p, axes in zip(params, self.axes, strict=True)
        ]
        self.named = isinstance(optimizer, str) and optimizer in pretrained_names()
        self.programs: dict[tuple[int, ...], GroupProgram] = {}
        with self.jax():
            self.learned, self.theta = optimizer, theta
            if isinstance(optimizer, str | Path):
                path = pretrained_file(str(optimizer)) if self.named else optimizer
                self.learned, self.theta = load(path)
            elif isinstance(optimizer, AbstractLearnedOptimizer):
                self.theta = optimizer.init(jax.random.key(0)) if theta is None else theta
            elif not hasattr(optimizer, "update"):
                raise ValueError(
                    f'LearnedOptimizer(optimizer={optimizer!r:.60}) is no optimizer; try "lopt-1".'
                )
            self.own_decay = isinstance(self.learned, MuonMLP)
            own = float(self.learned.weight_decay) if self.own_decay else 0.0
            self.decay = own if decay is None else decay
            # Our rate then stands for the learned schedule.
            scheduled = self.own_decay and self.learned.learning_rate is None
            self.constant = scheduled and num_steps is None
            if self.constant and rate is None:
                raise ValueError(
                    f"LearnedOptimizer({optimizer!r:.60}) needs the length of the run or a rate; "
                    f"try num_steps=1000, or lr={RATE}."
                )
            self.rate = 1.0 if rate is None else rate
            weights = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(self.theta))
            digest = hashlib.sha256(weights + repr(self.axes).encode()).hexdigest()[:8]
            name = optimizer if self.named else type(self.learned).__name__
            self.design = f"{name} ({digest}, layout={layout!r}, num_steps={num_steps})"

    @property
    def needs(self) -> set[str]:
        """What has to be given."""
        needs = {"loss"} if any(p.reads_loss for p in self.programs.values()) else set()
        timed = getattr(self.learned, "needs_num_steps", False) and not self.constant
        return needs | ({"num_steps"} if timed else set())

    def transformation(self, decay: Any) -> optax.GradientTransformationExtraArgs:
        """Returns the Optax optimizer, whose rate is one where ours stands for it."""
        changes: dict[str, Any] = {"learning_rate": 1.0} if self.constant else {}
        changes |= {"weight_decay": decay} if self.own_decay else {}
        with jax.ensure_compile_time_eval():  # files are read, also while it is traced
            if self.named:
                return pretrained(self.optimizer, self.num_steps, **changes)
            if not isinstance(self.learned, AbstractLearnedOptimizer):
                return optax.with_extra_args_support(self.learned)
            learned = dataclasses.replace(self.learned, **changes)
            return learned.optimizer(self.theta, self.num_steps)

    def program(self, rows: tuple[int, ...]) -> "GroupProgram":
        """Returns the program for some of the parameters of the group."""
        self.translate(rows)
        return self.programs[rows]

    # JAX runs while `torch.compile` traces, and leaves nothing in what it compiles.
    @torch.compiler.assume_constant_result
    def translate(self, rows: tuple[int, ...]) -> bool:
        """Makes the program, unless there is one; returns that there is."""
        if rows not in self.programs:
            with self.jax():
                self.programs[rows] = GroupProgram(self, rows)
        return True


def _check(name: str, tensor: torch.Tensor) -> None:
    """Refuses what no learned optimizer trains."""
    kinds = {
        str(tensor.dtype): tensor.dtype not in FLOATS,
        "sparse": tensor.layout != torch.strided,
        "on the meta device": tensor.is_meta,
        "sharded": hasattr(tensor, "device_mesh"),
    }
    for kind, wrong in kinds.items():
        if wrong:
            raise ValueError(
                f"LearnedOptimizer: the parameter {name} is {kind}; it trains dense, real floats "
                "on a device, so leave it out, or convert it first."
            )
