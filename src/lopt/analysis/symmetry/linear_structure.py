"""What linear units might have besides, once it is measured which units are linear.

As in `lopt.analysis.symmetry.structure`, guessing may be generous: all of it is measured.
"""

from collections.abc import Iterator, Sequence

from lopt.analysis.symmetry.blind import early_translation, unreached, unseen
from lopt.analysis.symmetry.builders import Order
from lopt.analysis.symmetry.generators import AbstractGenerator, Symmetry
from lopt.analysis.symmetry.linear import bias_exchange, mixing, query_key_mixing
from lopt.analysis.symmetry.places import leaves_by_path
from lopt.analysis.symmetry.structure import layers_of
from lopt.core.types import Params

# A basis has the square of their number as its tangents, so that of more units is not proposed.
_MOST_MIXED = 64
# Here a tangent belongs to each entry of a weight, and they are compared with one another.
_MOST_UNREACHED = 1024


def linear_candidates(
    params: Params, stretches: Sequence[Symmetry], heads: tuple[int, ...]
) -> Iterator[tuple[AbstractGenerator, ...]]:
    """Yields what linear units might have besides: of several, the first that holds is the one.

    Args:
        params: of the network.
        stretches: symmetries that stretch linear units.
        heads: numbers of heads into which the units may fall.
    """
    biases = {layer.weight: layer.bias for layer in layers_of(params)}
    leaves, follows = leaves_by_path(params), _dense_after(params, stretches)
    precedes = {after: before for before, after in follows.items()}
    for stretch in stretches:
        incoming = tuple(place.path for place in stretch.places if place.coefficient > 0)
        outgoing = tuple(place for place in stretch.places if place.coefficient < 0)
        numbers = [h for h in heads if not stretch.units % h and stretch.units > h]
        numbers = [h for h in numbers if stretch.units // h <= _MOST_MIXED]
        if stretch.kind == "query-key rescale":
            keys = tuple(place.path for place in outgoing)
            yield tuple(query_key_mixing(params, incoming, keys, heads=h) for h in numbers)
            continue
        after, view = outgoing[0].path, outgoing[0].view
        order: Order = "first" if view and outgoing[0].axis == 1 else "last"
        yield tuple(mixing(params, incoming, after, order=order, heads=h) for h in numbers)
        if view is not None or leaves[after].ndim > 2:
            continue
        bias = biases.get(after)
        if len(incoming) == 2 and bias is not None:
            yield (bias_exchange(params, incoming[1], after, bias),)
        if leaves[incoming[0]].ndim > 2:
            continue
        chain = _chain(after, follows)
        yield (early_translation(params, incoming[0], tuple(chain)),)
        least = min(len(leaves[path]) for path in chain)
        if stretch.units > least and leaves[incoming[0]].size <= _MOST_MIXED**2:
            yield (unseen(params, incoming, tuple(chain)),)
        front = _chain(incoming[0], precedes)[::-1]
        least = min(leaves[path].shape[1] for path in front)
        if stretch.units > least and leaves[after].size <= _MOST_UNREACHED:
            layers = [(path, biases.get(path)) for path in front]
            yield (unreached(params, layers, after, bias),)


def _chain(path: str, links: dict[str, str]) -> list[str]:
    """Returns a path and those that links lead to from it, one after another."""
    found = [path]
    while found[-1] in links and len(found) <= len(links):
        found.append(links[found[-1]])
    return found


def _dense_after(params: Params, stretches: Sequence[Symmetry]) -> dict[str, str]:
    """Returns of dense layers into linear units the dense layer that follows."""
    leaves, follows = leaves_by_path(params), {}
    for stretch in stretches:
        before, after = stretch.places[0], stretch.places[-1]
        both = leaves[before.path].ndim, leaves[after.path].ndim
        if stretch.kind == "rescale" and both == (2, 2) and after.view is None:
            follows[before.path] = after.path
    return follows
