"""Dynamics of optimizers: what their updates look like, and what they answer to."""

from lopt.analysis.dynamics.alignment import (
    Alignment,
    AlignmentRecord,
    LearningRate,
    OddnessRecord,
    alignment,
    effective_rate,
    with_mirror,
)
from lopt.analysis.dynamics.companions import (
    Companions,
    CompanionState,
    mirrored,
    reference_rules,
)
from lopt.analysis.dynamics.inputs import InputRecord, InputRows, given_inputs, recorded_inputs
from lopt.analysis.dynamics.noise import (
    Noise,
    Samples,
    covariance_spectrum,
    flatten_samples,
    noise_of,
    noise_samples,
    tail_index,
)
from lopt.analysis.dynamics.response import (
    partial_dependence,
    response_curves,
    sensitivities,
)
from lopt.analysis.dynamics.script import (
    ScriptedGradients,
    responses,
    scripted_updates,
    signal,
)
from lopt.analysis.dynamics.updates import UpdateDistribution, UpdateHistogram, tensor_names
from lopt.analysis.dynamics.valley import Portrait, Valley, valley_portrait, valley_starts

__all__ = [
    "Alignment",
    "AlignmentRecord",
    "CompanionState",
    "Companions",
    "InputRecord",
    "InputRows",
    "LearningRate",
    "Noise",
    "OddnessRecord",
    "Portrait",
    "Samples",
    "ScriptedGradients",
    "UpdateDistribution",
    "UpdateHistogram",
    "Valley",
    "alignment",
    "covariance_spectrum",
    "effective_rate",
    "flatten_samples",
    "given_inputs",
    "mirrored",
    "noise_of",
    "noise_samples",
    "partial_dependence",
    "recorded_inputs",
    "reference_rules",
    "response_curves",
    "responses",
    "scripted_updates",
    "sensitivities",
    "signal",
    "tail_index",
    "tensor_names",
    "valley_portrait",
    "valley_starts",
    "with_mirror",
]
