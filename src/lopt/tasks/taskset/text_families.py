"""Families of TaskSet on text: classification and language models by recurrent networks.

As those of images, fields are in the published order.
"""

import dataclasses
from typing import Any, Literal

from lopt.core.task import AbstractTask
from lopt.tasks.classification import classification
from lopt.tasks.data import Data
from lopt.tasks.language import rnn_language_model
from lopt.tasks.network_task import Build
from lopt.tasks.recurrent import MATRICES, Kind, RecurrentNetwork
from lopt.tasks.taskset.config import Config, Draw, Load, choice, drawn, family
from lopt.tasks.taskset.pieces import Initializer, activation, draw_activation, part_of

Tokens = Literal["bytes", "subwords", "classes"]

# Sorted, as published samplers choose from sorted names.
CORPORA = (
    *("imdb_reviews", "lm1b", "tokenized_amazon_reviews/Books_v1_02"),
    *("tokenized_amazon_reviews/Camera_v1_00", "tokenized_amazon_reviews/Home_v1_00"),
    *("tokenized_amazon_reviews/Video_v1_00", "tokenized_wikipedia/20190301.en"),
    *("tokenized_wikipedia/20190301.hsb", "tokenized_wikipedia/20190301.ja"),
    *("tokenized_wikipedia/20190301.ru", "tokenized_wikipedia/20190301.zh"),
)
REVIEWS = ("imdb_reviews", *CORPORA[2:6])


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A text as a task uses it.

    Attributes:
        data_set: the name of a corpus; of classification with "/bytes" or "/subwords8k" after it.
            As published, every name of classification loads the same: "imdb_reviews/subwords8k".
        tokens: what it consists of; "classes" of subwords or bytes with a label.
        length: tokens in an example.
        batch_size, train_examples, just_train: as of `ImageConfig`; for language models TaskSet
            does honour `just_train`.
    """

    data_set: str
    tokens: Tokens
    length: int
    batch_size: int
    train_examples: int | None
    just_train: bool

    @classmethod
    def draw(cls, draw: Draw, tokens: Tokens) -> "TextConfig":
        """Samples a text and how it is used."""
        labelled, published = tokens == "classes", draw.compat == "taskset"
        names = list(CORPORA)
        if labelled:
            names = [f"{name}/{kind}" for name in REVIEWS for kind in ("bytes", "subwords8k")]
            # For want of a comma two published names are one.
            names = names[1:] if published else names
        name = draw.choice(names)
        count = round(draw.uniform(1000, 50000)) if draw.flag(0.2) else None
        length = 0 if labelled else draw.log_integer(10, 160 if tokens == "bytes" else 256)
        batch_size, just_train = draw.log_integer(8, 512), draw.flag(0.2)
        if labelled:
            length, just_train = draw.log_integer(8, 128), just_train and not published
            name = "imdb_reviews/subwords8k" if published else name
        return cls(name, tokens, length, batch_size, count, just_train)

    def load(self, load: Load) -> Data:
        """Returns the data."""
        data = load(self.data_set, tokens=self.tokens, length=self.length)
        return part_of(data, self.train_examples, self.just_train)


@dataclasses.dataclass(frozen=True)
class CoreConfig:
    """A `RecurrentCore`, its activation None if it is not "vanilla".

    Attributes:
        initializers: of its matrices: one for all of them, or one for each.
    """

    kind: Kind
    width: int
    initializers: tuple[Initializer, ...]
    activation: str | None

    @classmethod
    def draw(cls, draw: Draw) -> "CoreConfig":
        """Samples a core."""
        kind: Kind = draw.choice(("vanilla", "gru", "lstm"))
        linked = draw.choice((True, True, True, True, False))
        width = draw.log_integer(32, 128) if kind == "gru" else 0
        count = 1 if linked else MATRICES[kind]
        initializers = [Initializer.draw(draw) for _ in range(count)]
        if kind == "vanilla":
            initializers.reverse()  # published ones are of U, then W
        elif len(initializers) == 6:
            initializers = [initializers[i] for i in (1, 2, 0, 4, 5, 3)]  # h, z, r
        name = draw_activation(draw) if kind == "vanilla" else None
        return cls(kind, width or draw.log_integer(32, 128), tuple(initializers), name)


def _network(config: Any) -> dict[str, Any]:
    """Returns what there is to say of a network besides its sizes."""
    return {
        "activation": activation(config.core.activation or "tanh"),
        "init": config.core.initializers,
        "output_init": config.initializer,
        "trainable_start": config.trainable_start,
    }


@family("rnn_text_classification_family")
class TextClassificationConfig(Config):
    """Classification of text by a recurrent network."""

    embed: int = drawn(lambda draw: draw.log_integer(8, 128))
    initializer: Initializer = drawn(Initializer.draw)
    text: TextConfig = drawn(lambda draw: TextConfig.draw(draw, "classes"))
    vocabulary: int = drawn(lambda draw: min(8185, draw.log_integer(100, 10000)))
    core: CoreConfig = drawn(CoreConfig.draw)
    trainable_start: bool = choice(True, False)
    read_out: Literal["last", "avg", "max"] = choice("last", "avg", "max")

    def build(self, load: Load) -> AbstractTask:
        """Makes the task; `load` gives token windows and their labels."""
        data, core = self.text.load(load), self.core
        sizes = self.vocabulary, data.num_classes, core.kind, core.width, self.embed
        network = Build(RecurrentNetwork, *sizes, read_out=self.read_out, **_network(self))
        return classification(data, network, self.text.batch_size, flatten=False)


@family("char_rnn_language_model_family")
class CharacterConfig(Config):
    """Recurrent language models on bytes, mostly all of them told apart."""

    embed: int = drawn(lambda draw: draw.log_integer(8, 128))
    initializer: Initializer = drawn(Initializer.draw)
    vocabulary: int = drawn(lambda draw: 256 if draw.flag(0.8) else draw.log_integer(100, 256))
    core: CoreConfig = drawn(CoreConfig.draw)
    trainable_start: bool = choice(True, False)
    text: TextConfig = drawn(lambda draw: TextConfig.draw(draw, "bytes"))

    def build(self, load: Load) -> AbstractTask:
        """Makes the task; `load` gives windows of tokens."""
        data, core = self.text.load(load), self.core
        sizes = core.kind, core.width, self.embed, self.text.batch_size, self.vocabulary
        return rnn_language_model(data, *sizes, **_network(self))


@family("word_rnn_language_model_family")
class WordConfig(CharacterConfig):
    """Recurrent language models on subwords."""

    vocabulary: int = drawn(lambda draw: draw.log_integer(1000, 30000))
    text: TextConfig = drawn(lambda draw: TextConfig.draw(draw, "subwords"))
