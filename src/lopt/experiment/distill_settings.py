"""What a distillation is asked for: settings, what they record, and the folder that keeps them."""

import dataclasses
import json
from pathlib import Path

import jax

from lopt.core.coordinatewise import Coordinatewise
from lopt.core.types import Theta
from lopt.experiment.runs import storage
from lopt.experiment.runs.files import digest, read_json, write_json
from lopt.experiment.settings import DistillSettings, RecordSettings, split_lag
from lopt.learned import MomentFeatures
from lopt.learned.averages import averaged_column, is_average
from lopt.symbolic.expression import Variable
from lopt.symbolic.gplearn_search import GplearnSearch
from lopt.symbolic.operon import OperonSearch
from lopt.symbolic.pysr_search import PysrSearch
from lopt.symbolic.record import RAW_GRADIENT
from lopt.symbolic.search import AbstractSearch
from lopt.symbolic.template import TemplateSearch

BACKENDS: dict[str, type[AbstractSearch]] = {
    "template": TemplateSearch,
    "operon": OperonSearch,
    "gplearn": GplearnSearch,
    "pysr": PysrSearch,
}
# What a rule with a memory is seen through besides its own features.
ALSO, DECAYS = ("warmup_0.98",), (0.5, 0.9, 0.98)
SETTINGS = "distill.json"


def record_settings(
    learned: Coordinatewise,
    theta: Theta,
    settings: DistillSettings,
    also: tuple[str, ...],
    decays: tuple[float, ...],
) -> RecordSettings:
    """Returns what is recorded of an optimizer that is seen through further features.

    Raises:
        ValueError: if `odd` names no feature.
    """
    features: tuple[str, ...] = ()
    names = {"gradient", RAW_GRADIENT}
    if settings.lags is None:
        columns = columns_of(learned, theta, settings.history)
        features, names = tuple(map(str, columns)), {column.name for column in columns}
    if unknown := sorted(set(settings.odd) - names):
        raise ValueError(
            f"DistillSettings(odd) names {', '.join(unknown)}; there are "
            f"{', '.join(sorted(names))}."
        )
    return RecordSettings(
        settings.rows,
        settings.steps,
        features,
        settings.lags,
        padded=True,
        also=also,
        decays=decays,
        seed=settings.seed,
    )


def odd_columns(odd: tuple[str, ...], features: tuple[str, ...]) -> tuple[str, ...]:
    """Returns odd features, and those of the features that are averages of them.

    Args:
        odd: names.
        features: columns as they are printed, with their lags.
    """
    names = [split_lag(feature)[0] for feature in features]
    return odd + tuple(
        dict.fromkeys(
            name
            for name in names
            if is_average(name) and averaged_column(name) in odd and name not in odd
        )
    )


def check_settings(
    out: Path, run: Path, settings: DistillSettings, features: tuple[str, ...]
) -> None:
    """Writes what a folder distils, or refuses a folder that distils something else.

    Raises:
        ValueError: if the folder holds a distillation of another run or with other settings.
    """
    asked = {
        "weights": digest(storage.weights_file(run)),
        "features": features,
        **dataclasses.asdict(settings),
    }
    # The choice is made anew, from what is kept, and so are texts.
    del asked["longest"], asked["digits"]
    asked["search"] = settings.searches
    asked = json.loads(json.dumps(asked))
    if (out / SETTINGS).exists():
        kept = read_json(out / SETTINGS)
        kept = kept if isinstance(kept, dict) else {}
        if different := sorted(k for k in {*asked, *kept} if kept.get(k) != asked.get(k)):
            raise ValueError(
                f"{out} holds a distillation with another {', '.join(different)}; give another "
                "folder with --out."
            )
    else:
        write_json(out / SETTINGS, asked)


def remembers(learned: Coordinatewise, theta: Theta) -> bool:
    """Returns whether the rule has a memory."""
    memory = jax.eval_shape(lambda theta: learned.rule.begin(theta["rule"], (1,)), theta)
    return bool(jax.tree.leaves(memory))


def extra_features(
    learned: Coordinatewise, theta: Theta, settings: DistillSettings
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Returns what to see the rule through: features, and decays of averages of its own.

    Raises:
        ValueError: if there is no such feature.
    """
    memory = settings.lags is None and remembers(learned, theta)
    also = (ALSO if memory else ()) if settings.also is None else settings.also
    decays = (DECAYS if memory else ()) if settings.decays is None else settings.decays
    named = MomentFeatures(also).names() if also else ()
    return tuple(name for name in named if name not in learned.features.names()), decays


def columns_of(learned: Coordinatewise, theta: Theta, history: int) -> list[Variable]:
    """Returns what an equation may be made of: all features, and their past if the rule has one."""
    lags = 1 + history if remembers(learned, theta) else 1
    names, columns = learned.features.names(), learned.features.column_names()
    # Time a step ago is time but for a constant, an average is one of now and of what it averages,
    # and what a parameter has moved since is the output of a step ago: an equation that may see
    # that explains the network by itself.
    return [
        Variable(name, lag)
        for lag in range(lags)
        for name in names
        if not lag or (name in columns and name != "parameter" and not is_average(name))
    ]
