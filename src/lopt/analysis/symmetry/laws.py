"""What becomes of a conserved quantity under SGD with weight decay and momentum: exact laws.

With coupled weight decay, v' = momentum v + a (g + decay theta) with a = 1 - dampening, and
theta' = theta - rate v'. For a stretch, with signed products [x, y] = sum of c x y,

    W  = momentum^2 [v,v] + a^2 [g,g] + a^2 decay^2 [th,th] + 2 momentum a [v,g]
         + 2 momentum a decay [th,v],             C = momentum [th,v] + a decay [th,th],
    [th,th]' = [th,th] - 2 rate C + rate^2 W,     [th,v]' = C - rate W,     [v,v]' = W

and for a shift m' = momentum m + a decay x, x' = x - rate m'. Nothing is approximated: [th,g] = 0
is the symmetry. What the laws need of a run are [g,g] and [v,g] of each step. See Kunin et al. 2021
(arXiv:2012.04728) for continuous time, and `continuous_law`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lopt.analysis.symmetry.deviation import check_names
from lopt.analysis.symmetry.generators import AbstractGenerator, Symmetry
from lopt.analysis.symmetry.places import Units
from lopt.core.checks import check_positive, is_real
from lopt.core.types import Params
from lopt.core.unroll import Step

Entries = Float[Array, "... unit"]


class HeavyBall(eqx.Module):
    """SGD with coupled weight decay and momentum, for which the laws are exact.

    Attributes:
        learning_rate: per inner step.
        weight_decay: added to gradients as weight_decay * params.
        momentum: of the velocity.
        dampening: gradients and decay enter the velocity times 1 - dampening.
    """

    learning_rate: float = eqx.field(static=True)
    weight_decay: float = eqx.field(static=True, default=0.0)
    momentum: float = eqx.field(static=True, default=0.0)
    dampening: float = eqx.field(static=True, default=0.0)

    def __check_init__(self) -> None:
        check_positive("HeavyBall", "learning_rate", self.learning_rate, 0.1)
        if not is_real(self.weight_decay) or not 0 <= self.weight_decay < float("inf"):
            raise ValueError(
                f"HeavyBall(weight_decay={self.weight_decay!r}) must be finite and at least 0; try "
                "1e-3."
            )
        for name, value in (("momentum", self.momentum), ("dampening", self.dampening)):
            if not is_real(value) or not 0 <= value < 1:
                raise ValueError(
                    f"HeavyBall({name}={value!r}) must be at least 0 and below 1; try 0.9."
                )

    def optimizer(self) -> optax.GradientTransformation:
        """Returns it for training."""
        return optax.chain(
            optax.add_decayed_weights(self.weight_decay),
            optax.scale(1 - self.dampening),
            optax.trace(self.momentum),
            optax.scale(-self.learning_rate),
        )


class Ledger(eqx.Module):
    """What the laws need of a step for one symmetry, of each of its units; recorded, of all steps.

    Attributes:
        conserved: [th, th], or the sum of c th for a shift.
        params_velocity: [th, v], or the sum of c v for a shift.
        velocity: [v, v]; grads: [g, g]; velocity_grads: [v, g]; updates: [u, u].
        first_order: 2 <u, xi> for a stretch and <u, xi> for a shift: how much the update changes
            what is conserved to first order.
    """

    conserved: Entries
    params_velocity: Entries
    velocity: Entries
    grads: Entries
    velocity_grads: Entries
    updates: Entries
    first_order: Entries

    def next_conserved(self, generator: Symmetry) -> Entries:
        """Returns what is conserved after the update, an identity for any optimizer."""
        if generator.motion == "shift":
            return self.conserved + self.first_order
        return self.conserved + self.first_order + self.updates


class LedgerProbe(eqx.Module):
    """Records a `Ledger` for each symmetry, by name: a record for `lopt.unroll`.

    The velocity is the trace in the optimizer's state, as `HeavyBall` and `optax.sgd` keep it, and
    zero if there is none.

    Attributes:
        generators: the symmetries, of different names.
    """

    generators: tuple[Symmetry, ...]

    def __check_init__(self) -> None:
        check_names("LedgerProbe", self.generators)
        for generator in self.generators:
            check_law("LedgerProbe", generator)

    def __call__(self, step: Step) -> dict[str, Ledger]:
        """Returns the ledgers of one step."""
        try:
            velocity = optax.tree.get(step.opt_state, "trace")
        except KeyError as error:
            raise ValueError(
                "LedgerProbe: the optimizer's state has more than one trace, and the laws know one "
                "velocity; try HeavyBall, or optax.sgd with momentum."
            ) from error
        if velocity is None:
            velocity = jax.tree.map(jnp.zeros_like, step.params)
        return {g.name: _ledger(g, step, velocity) for g in self.generators}


def check_law(owner: str, generator: AbstractGenerator, ledger: Ledger | None = None) -> None:
    """Refuses symmetries that no law is known for, and ledgers that are not of one run.

    Raises:
        ValueError: naming them.
    """
    if not isinstance(generator, Symmetry):
        name = getattr(generator, "name", generator)
        raise ValueError(
            f"{owner}({name!r}) is a {type(generator).__name__}, and laws are known for those that "
            "stretch or shift units; try rescale, scale or translation."
        )
    if ledger is None:
        return
    if jnp.ndim(ledger.grads) != 2 or jnp.shape(ledger.grads)[1] != generator.units:
        raise ValueError(
            f"{owner}(ledger) must be of all steps of one run, with {generator.units} units; its "
            f"arrays have shape {jnp.shape(ledger.grads)}. Try what lopt.unroll recorded, one run "
            "at a time."
        )


def exact_law(
    generator: Symmetry, optimizer: HeavyBall, ledger: Ledger
) -> Float[Array, "step unit"]:
    """Returns what the conserved quantity must be before each step of a recorded run.

    Args:
        generator: the symmetry.
        optimizer: what trained.
        ledger: what a `LedgerProbe` recorded of the run; of `conserved`, `params_velocity` and
            `velocity` only the first step is read.

    Raises:
        ValueError: if there is no law for such a symmetry, or `ledger` is not that of a run.
    """
    check_law("exact_law", generator, ledger)
    rate, decay, momentum = optimizer.learning_rate, optimizer.weight_decay, optimizer.momentum
    share = 1 - optimizer.dampening
    first = (ledger.conserved[0], ledger.params_velocity[0], ledger.velocity[0])

    def stretch(state: tuple[Units, Units, Units], sources: tuple[Units, Units]) -> tuple:
        (squares, mixed, velocity), (grads, velocity_grads) = state, sources
        own = share * decay
        turned = momentum * mixed + own * squares
        moved = (
            momentum**2 * velocity
            + share**2 * grads
            + own**2 * squares
            + 2 * momentum * (share * velocity_grads + own * mixed)
        )
        after = (squares - 2 * rate * turned + rate**2 * moved, turned - rate * moved, moved)
        return after, squares

    def shift(state: tuple[Units, Units, Units], _: tuple[Units, Units]) -> tuple:
        total, velocity, unused = state
        moved = momentum * velocity + share * decay * total
        return (total - rate * moved, moved, unused), total

    advance = stretch if generator.motion == "stretch" else shift
    return jax.lax.scan(advance, first, (ledger.grads, ledger.velocity_grads))[1]


def _ledger(generator: Symmetry, step: Step, velocity: Params) -> Ledger:
    """Returns the ledger of one symmetry."""
    params, grads, inner = step.params, step.grads, generator.inner
    stretch = generator.motion == "stretch"
    return Ledger(
        conserved=generator.conserved(params),
        params_velocity=inner(params, velocity) if stretch else generator.conserved(velocity),
        velocity=inner(velocity, velocity),
        grads=inner(grads, grads),
        velocity_grads=inner(velocity, grads),
        updates=inner(step.updates, step.updates),
        first_order=(2.0 if stretch else 1.0) * generator.along(params, step.updates),
    )
