"""Families of TaskSet on images: perceptrons, convolutions, autoencoders and flows.

Fields are those of the functions that make the tasks. They are drawn in the published order, so
that under compat="taskset" a seed gives the published configuration.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Literal

from lopt.core.task import AbstractTask
from lopt.tasks.autoencoding import Output, mlp_autoencoder, variational_autoencoder
from lopt.tasks.classification import image_shape, mlp_classification
from lopt.tasks.convolutional import Padding, Pool, conv_classification, remaining
from lopt.tasks.data import Data
from lopt.tasks.flows import normalising_flow
from lopt.tasks.taskset.config import Config, Draw, Load, family
from lopt.tasks.taskset.images import ImageConfig
from lopt.tasks.taskset.pieces import Initializer, activation, draw_activation, draw_widths


@dataclasses.dataclass(frozen=True)
class _ImageFamily(Config):
    make: ClassVar[Callable[..., AbstractTask]]

    activation: str
    initializer: Initializer
    images: ImageConfig

    def build(self, load: Load) -> AbstractTask:
        """Makes the task; `load` gives the data of a name."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        images, init = own.pop("images"), own.pop("initializer")
        own |= {"activation": activation(self.activation), "init": init}
        own |= {"batch_size": images.batch_size, "augment": images.augmentation}
        return self.make(images.load(load), **own)


def _draw_network(draw: Draw) -> dict[str, Any]:
    return {"activation": draw_activation(draw), "initializer": Initializer.draw(draw)}


@family("mlp_family", 99123491)
@dataclasses.dataclass(frozen=True)
class MLPFamily(_ImageFamily):
    """Classification by a multilayer perceptron."""

    make = staticmethod(mlp_classification)
    widths: tuple[int, ...]
    centre: bool

    @classmethod
    def draw(cls, draw: Draw) -> "MLPFamily":
        """Samples a configuration."""
        return cls(
            widths=draw_widths(draw, range(1, 7), 16, 128),
            **_draw_network(draw),
            images=ImageConfig.draw(draw),
            centre=draw.choice((True, False)),
        )


def _convolutional(
    data: Data, padding: tuple[Padding, ...], strides: tuple[int, ...], **rest: Any
) -> AbstractTask:
    """Returns a task of 3x3 convolutions; published ones on too small images do not build."""
    side, possible = min(image_shape(data)[:2]), list[Padding]()
    for stride, end in zip(strides, padding, strict=True):
        possible.append(end if remaining(side, 3, stride, end) else "SAME")
        side = remaining(side, 3, stride, possible[-1])
    how = {"kernel": 3, "padding": tuple(possible), "strides": strides}
    return conv_classification(data, **{"hidden": (), **how, **rest})


@dataclasses.dataclass(frozen=True)
class _Convolutions(_ImageFamily):
    make = staticmethod(_convolutional)
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    padding: tuple[Padding, ...]
    bias: bool
    centre: bool

    @staticmethod
    def draw_head(draw: Draw) -> dict[str, Any]:
        """Samples what follows the convolutions."""
        raise NotImplementedError

    @classmethod
    def draw(cls, draw: Draw) -> "_Convolutions":
        """Samples a configuration."""
        depth = draw.choice(range(1, 6))
        return cls(
            strides=(draw.choice(((2, 2), (1, 2), (2, 1))) * 3)[:depth],
            channels=draw_widths(draw, (depth,), 8, 64),
            **_draw_network(draw),
            padding=tuple(draw.choice(("SAME", "VALID")) for _ in range(depth)),
            **cls.draw_head(draw),
            bias=draw.choice((True, False)),
            images=ImageConfig.draw(draw),
            centre=draw.choice((True, False)),
        )


@family("conv_pooling_family")
@dataclasses.dataclass(frozen=True)
class ConvPoolingFamily(_Convolutions):
    """Classification by convolutions, one number per channel and a linear layer."""

    pool_all: Pool

    @staticmethod
    def draw_head(draw: Draw) -> dict[str, Any]:
        """Samples the kind of pooling."""
        return {"pool_all": draw.choice(("mean", "max", "squared_mean"))}


@family("conv_fc_family")
@dataclasses.dataclass(frozen=True)
class ConvFCFamily(_Convolutions):
    """Classification by convolutions and a perceptron."""

    hidden: tuple[int, ...]

    @staticmethod
    def draw_head(draw: Draw) -> dict[str, Any]:
        """Samples the widths of the perceptron."""
        return {"hidden": draw_widths(draw, range(4), 32, 128)}


@family("mlp_ae_family")
@dataclasses.dataclass(frozen=True)
class AutoencoderFamily(_ImageFamily):
    """Reconstruction of images."""

    make = staticmethod(mlp_autoencoder)
    widths: tuple[int, ...]
    output: Output
    distance: Literal["l2", "l1"]
    reduce: Literal["mean", "sum"]

    @classmethod
    def draw(cls, draw: Draw) -> "AutoencoderFamily":
        """Samples a configuration."""
        return cls(
            widths=draw_widths(draw, range(1, 7), 32, 128),
            **_draw_network(draw),
            images=ImageConfig.draw(draw),
            output=draw.choice(("tanh", "tanh", "sigmoid", "sigmoid", "linear_center", "linear")),
            distance=draw.choice(("l2", "l2", "l1")),
            reduce=draw.choice(("mean", "sum")),
        )


@family("mlp_vae_family")
@dataclasses.dataclass(frozen=True)
class VariationalFamily(_ImageFamily):
    """Variational autoencoders; many of those published, without `clip`, overflow at once."""

    make = staticmethod(variational_autoencoder)
    encoder: tuple[int, ...]
    decoder: tuple[int, ...]
    clip: bool

    @classmethod
    def draw(cls, draw: Draw) -> "VariationalFamily":
        """Samples a configuration."""
        return cls(
            encoder=draw_widths(draw, range(1, 5), 32, 128),
            decoder=draw_widths(draw, range(1, 4), 32, 128),
            **_draw_network(draw),
            images=ImageConfig.draw(draw),
            clip=draw.compat == "clean",
        )


@family("nvp_family", 123919936)
@dataclasses.dataclass(frozen=True)
class RealNVPFamily(_ImageFamily):
    """Densities of images by RealNVP."""

    make = staticmethod(functools.partial(normalising_flow, kind="real_nvp"))
    widths: tuple[int, ...]
    layers: int
    quirks: bool

    @classmethod
    def draw(cls, draw: Draw) -> "RealNVPFamily":
        """Samples a configuration."""
        return cls(
            **_draw_network(draw),
            images=ImageConfig.draw(draw),
            widths=draw_widths(draw, (1, 2), 16, 128),
            layers=draw.choice((1, 2, 3, 4)),
            quirks=draw.compat == "taskset",
        )


@family("maf_family", 6123348)
@dataclasses.dataclass(frozen=True)
class AutoregressiveFlowFamily(RealNVPFamily):
    """Densities of images by masked autoregressive flows."""

    make = staticmethod(functools.partial(normalising_flow, kind="autoregressive"))
