"""The task families of TaskSet (Metz et al. 2020, arXiv:2002.11887)."""

from lopt.tasks.taskset import image_families, text_families  # noqa: F401, add to FAMILIES
from lopt.tasks.taskset.config import FAMILIES, Config, from_json, parse, sample, to_json
from lopt.tasks.taskset.quadratic import QuadraticConfig
from lopt.tasks.taskset.synthetic import SyntheticConfig

__all__ = [
    "FAMILIES",
    "Config",
    "QuadraticConfig",
    "SyntheticConfig",
    "from_json",
    "parse",
    "sample",
    "to_json",
]
