"""What a distillation is asked for: settings, what they record, and the folder that keeps them."""

import dataclasses
import json
from pathlib import Path

import jax

from lopt.core.checks import check_integer
from lopt.core.coordinatewise import Coordinatewise
from lopt.core.types import Theta
from lopt.experiment import storage
from lopt.experiment.files import digest, read_json, write_json
from lopt.experiment.record_run import RecordSettings, parse_variable
from lopt.learned import MomentFeatures
from lopt.learned.averages import averaged_column, check_decays, is_average
from lopt.symbolic.expression import Variable
from lopt.symbolic.gplearn_search import GplearnSearch
from lopt.symbolic.operon import OperonSearch
from lopt.symbolic.pysr_search import PysrSearch
from lopt.symbolic.record import RAW_GRADIENT
from lopt.symbolic.search import AbstractSearch
from lopt.symbolic.template import TemplateSearch

SEARCHES: dict[str, type[AbstractSearch]] = {
    "template": TemplateSearch,
    "operon": OperonSearch,
    "gplearn": GplearnSearch,
    "pysr": PysrSearch,
}
# What a rule with a memory is seen through besides its own features.
ALSO, DECAYS = ("warmup_0.98",), (0.5, 0.9, 0.98)
SETTINGS = "distill.json"


@dataclasses.dataclass(frozen=True)
class DistillSettings:
    """How a run is distilled.

    Attributes:
        rows, steps: of the recorded table, see `RecordSettings`.
        history: how many steps back each feature is looked at, for rules with a memory; others
            see the present alone.
        also: features of `lopt.learned.MomentFeatures` besides those that the rule sees; `None`
            takes `ALSO` for rules with a memory, and none for others.
        decays: of exponential averages of what the rule sees, which memories are much like; `None`
            takes `DECAYS` for rules with a memory, and none for others.
        lags: raw gradients of so many steps in place of features.
        searches: names of backends.
        seeds: of each.
        search_rows: rows that a search sees.
        odd: names of features that change sign with the gradient, and with them their averages; if
            any, u(-g) = -u(g).
        longest: the most nodes of the equation that is chosen; any number by default.
        seed: of everything random.
    """

    rows: int = 20_000
    steps: int = 200
    history: int = 2
    also: tuple[str, ...] | None = None
    decays: tuple[float, ...] | None = None
    lags: int | None = None
    searches: tuple[str, ...] = ("template", "operon")
    seeds: int = 3
    search_rows: int = 2000
    odd: tuple[str, ...] = ()
    longest: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, hint in (
            ("rows", 100, 20_000),
            ("steps", 1, 200),
            ("history", 0, 2),
            ("seeds", 1, 3),
            ("search_rows", 10, 2000),
        ):
            check_integer("DistillSettings", name, getattr(self, name), least, hint=hint)
        if self.longest is not None:
            check_integer("DistillSettings", "longest", self.longest, 1, hint=50)
        check_decays("DistillSettings(decays)", self.decays or ())
        for name in self.searches:
            if name not in SEARCHES:
                raise ValueError(
                    f"DistillSettings(searches) has {name!r}; known are {', '.join(SEARCHES)}."
                )


def record_settings(
    learned: Coordinatewise,
    theta: Theta,
    settings: DistillSettings,
    also: tuple[str, ...],
    decays: tuple[float, ...],
) -> RecordSettings:
    """Returns what is recorded of an optimizer that is seen through further features.

    Raises:
        ValueError: if there are fewer steps than are looked back, or `odd` names no feature.
    """
    features: tuple[str, ...] = ()
    names = {"gradient", RAW_GRADIENT}
    if settings.lags is None:
        columns = columns_of(learned, theta, settings.history)
        features, names = tuple(map(str, columns)), {column.name for column in columns}
    if settings.history >= settings.steps:
        raise ValueError(
            f"DistillSettings(history={settings.history}, steps={settings.steps}) looks back "
            f"further than a training goes; try --history 2 or --steps {10 * settings.history}."
        )
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
    )


def odd_columns(odd: tuple[str, ...], features: tuple[str, ...]) -> tuple[str, ...]:
    """Returns odd features, and those of the features that are averages of them.

    Args:
        odd: names.
        features: columns as they are printed, with their lags.
    """
    names = [parse_variable(feature).name for feature in features]
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
    # The choice is made anew, from what is kept.
    del asked["longest"]
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
