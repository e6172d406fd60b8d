"""Found: the symmetries of a task, proposed from its structure and measured on its loss."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import numpy as np

from lopt.analysis.symmetry.bench import Bench, prepare_bench
from lopt.analysis.symmetry.check import (
    Evidence,
    check_group,
    check_task,
    check_tolerance,
    default_tolerance,
    measure_move,
    measure_slopes,
)
from lopt.analysis.symmetry.discrete import DiscreteMap
from lopt.analysis.symmetry.generators import AbstractGenerator, Symmetry
from lopt.analysis.symmetry.layout import Layout, layouts_of
from lopt.analysis.symmetry.linear_structure import linear_candidates
from lopt.analysis.symmetry.places import leaves_by_path
from lopt.analysis.symmetry.structure import (
    continuous_candidates,
    degrees_of,
    discrete_candidates,
    heads_of,
)
from lopt.core.task import AbstractTask
from lopt.core.types import Key, Params

# Below this slope, what does not hold holds nearly, as scale does before a norm with an epsilon.
NEARLY = 1e-3


class Symmetries(eqx.Module):
    """What `symmetries` found.

    Attributes:
        generators: the continuous symmetries that hold.
        nearly: those that hold but for a slope and a move below a thousandth, such as that of scale
            before a batch norm, whose epsilon of 1e-5 does not scale.
        maps: the permutations and sign flips that hold.
        evidence: what was measured of all these, and of all that were proposed and do not hold, by
            name.
    """

    generators: tuple[AbstractGenerator, ...]
    nearly: tuple[AbstractGenerator, ...]
    maps: tuple[DiscreteMap, ...]
    evidence: dict[str, Evidence]

    def of_kind(self, kind: str) -> tuple[AbstractGenerator, ...]:
        """Returns the generators of one kind, also those that hold nearly."""
        return tuple(g for g in (*self.generators, *self.nearly) if g.kind == kind)

    def __str__(self) -> str:
        """A line for each symmetry that holds, at least nearly."""
        held: tuple[Any, ...] = (*self.generators, *self.nearly, *self.maps)
        return "\n".join(str(self.evidence[symmetry.name]) for symmetry in held)


def symmetries(
    task: AbstractTask,
    key: Key,
    *,
    params: Params | None = None,
    batches: int = 3,
    tolerance: float | None = None,
    others: Sequence[AbstractGenerator | DiscreteMap] = (),
) -> Symmetries:
    """Returns the symmetries of a task that can be found.

    Proposed are translation, scale, bias shift, rescale, that of gain and shift of a norm, and that
    of queries and keys, for all layers that their shapes allow, also where several of one module
    read the same units, as attention and gates do; and permutations and sign flips, of hidden
    units, of a width that several layers share, and of attention heads. Where units turn out to be
    linear, as they can be stretched and flipped, so are changes of their basis (up to 64 units at a
    time), what of biases and translations passes through them, what the layers behind them do not
    see (of weights up to 4,096 entries), and what those in front do not reach (1,024). For a model
    or a loss that is no task, see `ModelLoss`.

    Weights are (outputs, inputs, ...), as Equinox has them, or (..., inputs, outputs), as in x @ w
    and in Flax: biases tell, and where none does, both are tried of all but modules of Equinox. A
    weight and its bias are known by the last word of their paths: "weight" and "bias", "kernel" and
    "bias", "w" or "W" and "b", also with one number behind both, as "w1" and "b1". Other layouts
    and names are tested by giving their generators as `others`.

    Args:
        task: the task.
        key: of the batches and moves, and of the params.
        params: where to measure; by default initial params with noise.
        batches: on how many batches.
        tolerance: see `check_symmetry`.
        others: symmetries to propose besides; one that is proposed anyway counts once.

    Raises:
        ValueError: if `task` is none, if nothing can be told at the params, or if one of `others`
            has the name of a different symmetry.

    Example:
        >>> import jax, lopt
        >>> task = lopt.tasks.mlp_classification(lopt.load_images("digits"), widths=(8,))
        >>> found = symmetries(task, jax.random.key(0))
        >>> [(generator.kind, generator.units) for generator in found.generators]
        [('translation', 9), ('rescale', 8)]
        >>> [each.motion for each in found.maps]
        ['permute']
    """
    check_task("symmetries", task)
    check_tolerance("symmetries", tolerance)
    bench = prepare_bench("symmetries", task, params, key, batches)
    tolerance = default_tolerance(bench.params) if tolerance is None else tolerance
    views = _views(task, bench.params)
    guessed: dict[Any, Symmetry | DiscreteMap] = {}
    for view in views:
        for doing, (_, own) in view.guesses.items():
            guessed.setdefault(doing, own)
    proposed = _with_others(list(guessed.values()), others)
    continuous = [each for each in proposed if isinstance(each, AbstractGenerator)]
    for generator in others:
        # The structure's own are what they should be.
        if isinstance(generator, AbstractGenerator) and not isinstance(generator, Symmetry):
            check_group(generator, bench.params)
    # A wide tolerance is not to be narrower for what is nearly a symmetry.
    most = max(NEARLY, tolerance)
    evidence = _measure(continuous, bench, tolerance, most)
    maps = [each for each in proposed if isinstance(each, DiscreteMap)]
    for each in maps:
        moved = measure_move(each, bench)
        evidence[each.name] = Evidence(each.name, np.zeros(0), moved, 0, tolerance)
    kept = _without_composed([each for each in maps if evidence[each.name].holds])
    held = [g for g in continuous if evidence[g.name].holds]
    # Of two layouts, the one in which more holds.
    holding = {doing for doing, own in guessed.items() if evidence[own.name].holds}
    view = max(views, key=lambda view: len(holding & view.guesses.keys()))
    groups = view.around({_doing(each) for each in _linear(held, kept)}, bench.params)
    basis = [each for group in groups for each in group]
    known = {each.name for each in basis}
    basis = _with_others(basis, [other for other in others if other.name in known])
    basis = [each for each in basis if each.name not in evidence]
    evidence |= _measure(basis, bench, tolerance, most)
    measured = {each.name for each in basis}
    for group in groups:
        found = [g for g in group if g.name in measured and evidence[g.name].holds]
        held.extend(found[:1])
    names = {g.name for g in held}
    near = [g for g in (*continuous, *basis) if evidence[g.name].within(most)]
    near = [g for g in near if not evidence[g.name].holds]
    exact = _without_implied(held)
    nearly = [g for g in _without_implied([*held, *near]) if g.name not in names]
    return Symmetries(tuple(exact), tuple(nearly), kept, evidence)


class _View(NamedTuple):
    """How params may be laid out, and what is guessed of them then.

    Attributes:
        layout: the layout.
        params: with their outputs first.
        heads: numbers of heads that attention layers might have.
        guesses: of `params`, and the symmetries of the params themselves that they are, by what
            these do.
    """

    layout: Layout
    params: Params
    heads: tuple[int, ...]
    guesses: dict[Any, tuple[Symmetry | DiscreteMap, Symmetry | DiscreteMap]]

    def around(self, linear: set[Any], params: Params) -> list[list[AbstractGenerator]]:
        """Returns what linear units might have besides, by what their stretches do."""
        stretches = [
            guess
            for doing, (guess, _) in self.guesses.items()
            if isinstance(guess, Symmetry) and doing in linear
        ]
        groups = linear_candidates(self.params, stretches, self.heads)
        leaves = leaves_by_path(params)
        return [[self.layout.own(guess, leaves) for guess in group] for group in groups]


def _views(task: AbstractTask, params: Params) -> list[_View]:
    """Returns how the params may be laid out, and what is guessed of them then."""
    views, leaves, degrees, counts = [], leaves_by_path(params), degrees_of(task), heads_of(task)
    for layout in layouts_of(params):
        seen = layout.outputs_first(params)
        heads = tuple(sorted({*counts, *layout.heads}))
        found: list[Symmetry | DiscreteMap] = [*continuous_candidates(seen, degrees)]
        found += discrete_candidates(seen, heads)
        guesses = dict[Any, Any]()
        for guess in found:
            own = layout.own(guess, leaves)
            guesses.setdefault(_doing(own), (guess, own))
        views.append(_View(layout, seen, heads, guesses))
    return views


def _doing(symmetry: Symmetry | DiscreteMap) -> tuple[Any, ...]:
    """Returns what a symmetry does, by whatever name, and in whichever direction."""
    places = sorted(symmetry.places, key=lambda place: (place.path, str(place.axis)))
    first = places[0].coefficient
    continuous = isinstance(symmetry, Symmetry)
    owned = [(p.path, p.axis, p.view, p.coefficient / first * continuous) for p in places]
    return symmetry.motion, *owned


def _measure(
    generators: Sequence[AbstractGenerator], bench: Bench, tolerance: float, most: float
) -> dict[str, Evidence]:
    """Returns the evidence of each; those of a slope above `most` are not moved."""
    evidence: dict[str, Evidence] = {}
    if not generators:
        return evidence
    for generator, (slope, idle) in zip(generators, measure_slopes(generators, bench), strict=True):
        # A slope is enough to refuse, and costs nothing; only what passes is moved along.
        moves = slope.max() <= most and idle < generator.units
        moved = measure_move(generator, bench) if moves else None
        evidence[generator.name] = Evidence(generator.name, slope, moved, idle, tolerance)
    return evidence


def _linear(
    generators: Sequence[AbstractGenerator], maps: Sequence[DiscreteMap]
) -> tuple[Symmetry, ...]:
    """Returns the stretches of linear units: of degree 1, where signs may be flipped as well."""
    flipped = [
        {(place.path, place.axis) for place in each.places}
        for each in maps
        if each.motion == "flip"
    ]
    return tuple(
        g
        for g in generators
        if isinstance(g, Symmetry)
        and g.kind in ("rescale", "query-key rescale")
        and {place.coefficient for place in g.places} == {1.0, -1.0}
        and {(place.path, place.axis) for place in g.places} in flipped
    )


def _without_composed(maps: Sequence[DiscreteMap]) -> tuple[DiscreteMap, ...]:
    """Leaves out what does at once to several sets of units what others do to each."""
    sides = [{(place.path, place.axis, place.view) for place in each.places} for each in maps]
    kept = []
    for each, own in zip(maps, sides, strict=True):
        parts = [
            side
            for other, side in zip(maps, sides, strict=True)
            if other.motion == each.motion and side < own
        ]
        if set().union(*parts) != own:
            kept.append(each)
    return tuple(kept)


def _with_others(proposed: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """Returns all that is proposed, equal ones once, as evidence is kept by name.

    Raises:
        ValueError: if one of `others` has the name of a different symmetry.
    """
    known: dict[str, Any] = {}
    for each in proposed:
        known.setdefault(each.name, each)
    for other in others:
        same = known.setdefault(other.name, other)
        if type(same) is not type(other) or not bool(eqx.tree_equal(same, other)):
            raise ValueError(
                f"symmetries(others) has a symmetry named {other.name!r}, as another is that is "
                "tested too; try name= when it is built."
            )
    return list(known.values())


def _without_implied(generators: Sequence[AbstractGenerator]) -> list[AbstractGenerator]:
    """Leaves out what scales or shifts all units of a symmetry that is already there as one."""
    owned = [
        {place.path for place in g.places if place.axis is not None}
        for g in generators
        if isinstance(g, Symmetry) and g.kind in ("scale", "bias shift")
    ]
    kept = []
    for generator in generators:
        paths = {p.path for p in generator.places} if isinstance(generator, Symmetry) else set()
        whole = generator.kind == "scale" and generator.units == 1
        if not (whole and any(paths <= others for others in owned)):
            kept.append(generator)
    return kept
