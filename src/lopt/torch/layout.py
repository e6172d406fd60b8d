"""Layout: PyTorch stores the outputs of a layer first, the rules of lopt read inputs first.

A rule that treats rows and columns differently would be another rule on transposed matrices, so
axes are exchanged at the border: learned optimizers see what Flax would show them.
"""

import torch
from torch import nn

from lopt.bridges.export import inputs_first
from lopt.learned.matrices import has_word

# Axes of a tensor of PyTorch in the order in which a rule sees them.
Axes = tuple[int, ...]


def by_rank(name: str, tensor: torch.Tensor, layout: str) -> Axes:
    """Returns the axes of a parameter of which only its name and rank are known.

    Matrices are taken for those of `nn.Linear`, but for tables of embeddings and positions, which
    are known by name; what has three to five axes is taken for a kernel of a convolution.
    """
    rank = tensor.ndim
    if layout == "jax" or rank < 2 or rank > 5 or has_word(name, ("embed", "position")):
        return tuple(range(rank))
    return inputs_first(rank)


def axes_of(model: nn.Module) -> dict[str, Axes]:
    """Returns the axes of each parameter of a model, by the type of its module.

    Kernels of `nn.Linear`, of convolutions and of recurrent and attention layers are seen inputs
    first, outputs last. Other parameters are seen as they are.
    """
    linear = nn.Linear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention
    found: dict[str, Axes] = {}
    for name, parameter in model.named_parameters():
        owner, rank = owner_of(name, model), parameter.ndim
        axes = tuple(range(rank))
        if isinstance(owner, nn.modules.conv._ConvNd) and rank > 2:
            inputs, outputs = (0, 1) if owner.transposed else (1, 0)
            axes = (*range(2, rank), inputs, outputs)
        elif isinstance(owner, linear) and rank == 2:
            axes = (1, 0)
        found[name] = axes
    return found


def key_of(name: str, model: nn.Module) -> str:
    """Returns the name under which a rule sees a parameter; embeddings are known by theirs."""
    table = isinstance(owner_of(name, model), nn.Embedding | nn.EmbeddingBag)
    return f"{name}: embedding" if table and not has_word(name, ("embed",)) else name


def owner_of(name: str, model: nn.Module) -> nn.Module:
    """Returns the module of a parameter; the original of a parametrized one lies below it."""
    return model.get_submodule(name.partition("parametrizations.")[0].rpartition(".")[0])
