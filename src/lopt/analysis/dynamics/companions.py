"""Companions: what other optimizers would do at every step of a run.

They see the same gradients at the same params, and each keeps its own state along the run, so that
what differs between them is the rule and not the path. They travel in the optimizer state:
`lopt.unroll` remains the only loop.
"""

from typing import Any

import equinox as eqx
import jax
import optax

from lopt.analysis.dynamics.checks import check_optimizer, update_or_refuse
from lopt.core.checks import check_positive
from lopt.core.types import Params, State
from lopt.core.unroll import Step


class CompanionState(eqx.Module):
    """The state of the optimizer that trains, and those of its companions."""

    own: State
    others: dict[str, State]


class Companions(eqx.Module):
    """An optimizer, and others that look on.

    Attributes:
        trains: the optimizer whose updates are applied.
        others: those that look on, by name.

    Train with `companions.optimizer`; in the record, `companions.updates(step)` is what each of
    the others would have added.
    """

    trains: optax.GradientTransformation
    others: dict[str, optax.GradientTransformation]

    def __check_init__(self) -> None:
        check_optimizer("Companions", "trains", self.trains)
        if not self.others:
            raise ValueError("Companions(others={}) must name one at least; try reference_rules().")
        for name, other in self.others.items():
            check_optimizer("Companions", f"others[{name!r}]", other)

    @property
    def optimizer(self) -> optax.GradientTransformationExtraArgs:
        """The optimizer to train with: it does what `trains` does."""
        return optax.GradientTransformationExtraArgs(self._init, self._update)

    def updates(self, step: Step) -> dict[str, Params]:
        """Returns what each of the others would have added to the params at this step.

        Raises:
            ValueError: if the run's optimizer is not `self.optimizer`.
        """
        # The compiler sees that the optimizer has computed the same, and does it once.
        return {name: update for name, (update, _) in self._look_on(step).items()}

    def _look_on(self, step: Step) -> dict[str, tuple[Params, State]]:
        if not isinstance(step.opt_state, CompanionState) or set(step.opt_state.others) != set(
            self.others
        ):
            raise ValueError(
                f"Companions(others={list(self.others)}).updates(step): this run has another "
                f"optimizer, with a {type(step.opt_state).__name__} as its state; give start and "
                "unroll companions.optimizer."
            )
        return self._all(step.grads, step.opt_state.others, step.params, {"value": step.loss})

    def _init(self, params: Params) -> CompanionState:
        return CompanionState(
            self.trains.init(params),
            {name: other.init(params) for name, other in self.others.items()},
        )

    def _update(
        self, updates: Params, state: CompanionState, params: Params | None = None, **extra: Any
    ) -> tuple[Params, CompanionState]:
        own, own_state = update_or_refuse(
            "Companions.optimizer", self.trains, updates, state.own, params, extra
        )
        others = self._all(updates, state.others, params, extra)
        return own, CompanionState(own_state, {name: after for name, (_, after) in others.items()})

    def _all(
        self, grads: Params, states: dict[str, State], params: Params | None, extra: dict[str, Any]
    ) -> dict[str, tuple[Params, State]]:
        return {
            name: update_or_refuse(
                f"Companions.optimizer, because of {name!r},",
                other,
                grads,
                states[name],
                params,
                extra,
            )
            for name, other in self.others.items()
        }


def reference_rules(
    sgd: float = 0.1, momentum: float = 0.01, adam: float = 1e-3, lion: float = 1e-4
) -> dict[str, optax.GradientTransformation]:
    """Returns the customary references, with these learning rates and no weight decay.

    Angles to them do not depend on the rates, sizes relative to them do.

    Raises:
        ValueError: if a rate is not positive and finite.
    """
    rates = {"sgd": (sgd, 0.1), "momentum": (momentum, 0.01), "adam": (adam, 1e-3)}
    for name, (rate, hint) in (rates | {"lion": (lion, 1e-4)}).items():
        check_positive("reference_rules", name, rate, hint)
    return {
        "SGD": optax.sgd(sgd),
        "momentum": optax.sgd(momentum, momentum=0.9),
        "Adam": optax.adam(adam),
        "Lion": optax.lion(lion, weight_decay=0.0),
    }


def mirrored(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer as it would be with every gradient turned around.

    An odd rule then turns its updates around; what is left of u + u_mirrored is its oddness defect.
    """
    check_optimizer("mirrored", "optimizer", optimizer)

    def update(
        updates: Params, state: State, params: Params | None = None, **extra: Any
    ) -> tuple[Params, State]:
        turned = jax.tree.map(lambda g: -g, updates)
        return update_or_refuse("mirrored(...)", optimizer, turned, state, params, extra)

    return optax.GradientTransformationExtraArgs(optimizer.init, update)
