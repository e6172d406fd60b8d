"""PyTorch: any learned optimizer of lopt, and any of Optax, as a `torch.optim.Optimizer`.

pip install "lopt[torch]"
"""

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError('lopt.torch needs PyTorch; try pip install "lopt[torch]".') from error

from lopt.torch.layout import axes_of
from lopt.torch.optimizer import LearnedOptimizer

__all__ = ["LearnedOptimizer", "axes_of"]
