"""The demo: from Muon to better than Muon on perceptrons over 8x8 digits, in a few minutes.

Gradients are exact, through all steps of inner training, and count less where they explode.
"""

import dataclasses

import jax

import lopt
from lopt.estimators import Clipped
from lopt.experiment.recipes import digits
from lopt.experiment.recipes.lopt_1 import ESTIMATORS, RampedLogLoss


@dataclasses.dataclass(frozen=True)
class Recipe(digits.Recipe):
    """The demo: a rule that starts at Muon, meta-trained on perceptrons over 8x8 digits.

    Gradients are exact: estimator, truncation and sigma have no effect.
    """

    optimizer: str = "muon_mlp"  # the design; any of lopt.experiment.recipes.DESIGNS.
    outer_steps: int = 60  # steps of meta-training, by exact gradients.
    learning_rate: float = 0.01  # of the outer AdamW; falls to zero along a cosine.

    def one(self, inner: lopt.InnerTraining) -> lopt.AbstractGradientEstimator:
        """Returns exact gradients of log losses, half of them held-out."""
        inner = dataclasses.replace(inner, objective=RampedLogLoss())
        return Clipped(lopt.MetaTask(inner), ESTIMATORS["exact"][-1])

    def build(self) -> lopt.Experiment:
        made = super().build()
        # The start is judged as well, to show what was gained.
        start = made.learned.init(jax.random.key(self.seed))
        return dataclasses.replace(made, initial=start, steps_per_chunk=10)
