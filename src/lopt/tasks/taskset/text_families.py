"""Families of TaskSet on text: classification and language models by recurrent networks.

As those of images, fields are drawn in the published order.
"""

import dataclasses
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp

from lopt.core.task import AbstractTask
from lopt.tasks.classification import classification
from lopt.tasks.data import Data
from lopt.tasks.language import rnn_language_model
from lopt.tasks.network_task import Build
from lopt.tasks.recurrent import MATRICES, Kind, RecurrentNetwork
from lopt.tasks.taskset.config import Config, Draw, Load, family
from lopt.tasks.taskset.pieces import Initializer, activation, draw_activation

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
        batch_size: examples per step.
        train_examples: how many are trained on, if there are so many; None for all.
        just_train: whether all splits are the training split. For classification TaskSet samples
            this and leaves it at that, so that it is False under compat="taskset".
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
        if tokens == "classes":
            names = [f"{name}/{kind}" for name in REVIEWS for kind in ("bytes", "subwords8k")]
            # For want of a comma two published names are one.
            name = draw.choice(names[1:] if draw.compat == "taskset" else names)
            name = "imdb_reviews/subwords8k" if draw.compat == "taskset" else name
        else:
            name = draw.choice(CORPORA)
        count = round(draw.uniform(1000, 50000)) if draw.flag(0.2) else None
        if tokens == "classes":
            batch_size, just_train = draw.log_integer(8, 512), draw.flag(0.2)
            length = draw.log_integer(8, 128)
            just_train = just_train and draw.compat == "clean"
        else:
            length = draw.log_integer(10, 160 if tokens == "bytes" else 256)
            batch_size, just_train = draw.log_integer(8, 512), draw.flag(0.2)
        return cls(name, tokens, length, batch_size, count, just_train)

    def load(self, load: Load) -> Data:
        """Returns the data; of a text, an example counts as many tokens as it is long."""
        data = load(self.data_set, tokens=self.tokens, length=self.length)
        if self.train_examples is not None:
            rows = self.train_examples * (data.train.length or 1)
            count = jnp.minimum(data.train.count, rows)
            data = eqx.tree_at(lambda data: data.train.count, data, count)
        if self.just_train:
            return Data(data.train, data.train, data.train, data.train, data.num_classes)
        return data


@dataclasses.dataclass(frozen=True)
class CoreConfig:
    """A recurrent core.

    Attributes:
        kind: "vanilla", "gru" or "lstm".
        width: the number of units.
        initializers: of its matrices: one for all of them, or one for each.
        activation: of a vanilla one; None for others.
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


@dataclasses.dataclass(frozen=True)
class _TextFamily(Config):
    embed: int
    initializer: Initializer
    vocabulary: int
    core: CoreConfig
    trainable_start: bool
    text: TextConfig

    def network(self) -> dict[str, Any]:
        """Returns what there is to say of the network besides its sizes."""
        return {
            "activation": activation(self.core.activation or "tanh"),
            "init": self.core.initializers,
            "output_init": self.initializer,
            "trainable_start": self.trainable_start,
        }


@family("rnn_text_classification_family")
@dataclasses.dataclass(frozen=True)
class TextClassificationFamily(_TextFamily):
    """Classification of text by a recurrent network."""

    read_out: Literal["last", "avg", "max"]

    @classmethod
    def draw(cls, draw: Draw) -> "TextClassificationFamily":
        """Samples a configuration."""
        return cls(
            embed=draw.log_integer(8, 128),
            initializer=Initializer.draw(draw),
            text=TextConfig.draw(draw, "classes"),
            vocabulary=min(8185, draw.log_integer(100, 10000)),
            core=CoreConfig.draw(draw),
            trainable_start=draw.choice((True, False)),
            read_out=draw.choice(("last", "avg", "max")),
        )

    def build(self, load: Load) -> AbstractTask:
        """Makes the task; `load` gives token windows and their labels."""
        data = self.text.load(load)
        core = self.core
        sizes = self.vocabulary, data.num_classes, core.kind, core.width, self.embed
        network = Build(RecurrentNetwork, *sizes, read_out=self.read_out, **self.network())
        return classification(data, network, self.text.batch_size, flatten=False)


class _LanguageFamily(_TextFamily):
    @staticmethod
    def draw_text(draw: Draw) -> TextConfig:
        """Samples the text."""
        raise NotImplementedError

    @staticmethod
    def draw_vocabulary(draw: Draw) -> int:
        """Samples how many tokens are told apart."""
        raise NotImplementedError

    @classmethod
    def draw(cls, draw: Draw) -> "_LanguageFamily":
        """Samples a configuration."""
        return cls(
            embed=draw.log_integer(8, 128),
            initializer=Initializer.draw(draw),
            vocabulary=cls.draw_vocabulary(draw),
            core=CoreConfig.draw(draw),
            trainable_start=draw.choice((True, False)),
            text=cls.draw_text(draw),
        )

    def build(self, load: Load) -> AbstractTask:
        """Makes the task; `load` gives windows of tokens."""
        core = self.core
        sizes = core.kind, core.width, self.embed, self.text.batch_size, self.vocabulary
        return rnn_language_model(self.text.load(load), *sizes, **self.network())


@family("char_rnn_language_model_family")
class CharacterFamily(_LanguageFamily):
    """Recurrent language models on bytes."""

    @staticmethod
    def draw_text(draw: Draw) -> TextConfig:
        """Samples the text."""
        return TextConfig.draw(draw, "bytes")

    @staticmethod
    def draw_vocabulary(draw: Draw) -> int:
        """Samples how many tokens are told apart: mostly all."""
        return 256 if draw.flag(0.8) else draw.log_integer(100, 256)


@family("word_rnn_language_model_family")
class WordFamily(_LanguageFamily):
    """Recurrent language models on subwords."""

    @staticmethod
    def draw_text(draw: Draw) -> TextConfig:
        """Samples the text."""
        return TextConfig.draw(draw, "subwords")

    @staticmethod
    def draw_vocabulary(draw: Draw) -> int:
        """Samples how many tokens are told apart."""
        return draw.log_integer(1000, 30000)
