"""Autoencoders of images: plain, and variational (Kingma and Welling 2013, arXiv:1312.6114)."""

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lopt.core.types import Key, Scalar
from lopt.tasks.classification import Init, MultilayerPerceptron, image_shape
from lopt.tasks.data import Data, Rows
from lopt.tasks.network_task import Augment, Build, EquinoxNetwork, NetworkTask, Predict

Output: TypeAlias = Literal["tanh", "sigmoid", "linear_center", "linear"]
BIN = 1 / 255  # the distance of two values of a pixel


def flatten(rows: Rows) -> Float[Array, "n pixels"]:
    """Returns the images of a batch of `Labelled` as rows of pixels."""
    return rows.arrays.images.reshape(len(rows.arrays.images), -1)


class ReconstructionError(eqx.Module):
    """The objective of autoencoders: "loss", how far outputs are from the images themselves.

    Attributes:
        output: what outputs are passed through; with "tanh" and "linear_center" pixels lie between
            -1 and 1, and otherwise between 0 and 1.
        distance: "l2" for squared errors, "l1" for absolute ones.
        reduce: whether errors of an image are averaged over pixels, or added.
    """

    output: Output = eqx.field(static=True, default="sigmoid")
    distance: Literal["l2", "l1"] = eqx.field(static=True, default="l2")
    reduce: Literal["mean", "sum"] = eqx.field(static=True, default="mean")

    def __call__(self, predict: Predict, rows: Rows) -> dict[str, Scalar]:
        """Returns the loss of a network on a batch."""
        pixels = flatten(rows)
        pixels = 2 * pixels - 1 if self.output in ("tanh", "linear_center") else pixels
        outputs = predict(pixels)
        squash = {"tanh": jnp.tanh, "sigmoid": jax.nn.sigmoid}.get(self.output)
        errors = (outputs if squash is None else squash(outputs)) - pixels.astype(outputs.dtype)
        errors = errors**2 if self.distance == "l2" else jnp.abs(errors)
        reduce = jnp.mean if self.reduce == "mean" else jnp.sum
        return {"loss": rows.mean(reduce(errors, axis=1))}


def mlp_autoencoder(
    data: Data,
    widths: tuple[int, ...] = (128, 32, 128),
    activation: Callable[[Array], Array] = jax.nn.relu,
    batch_size: int = 128,
    output: Output = "sigmoid",
    distance: Literal["l2", "l1"] = "l2",
    reduce: Literal["mean", "sum"] = "mean",
    init: Init = "truncated_normal",
    augment: Augment | None = None,
) -> NetworkTask:
    """Returns the reconstruction of images by a multilayer perceptron.

    For `output`, `distance` and `reduce` see `ReconstructionError`; other arguments are those of
    `mlp_classification`.
    """
    pixels = math.prod(image_shape(data))
    network = Build(MultilayerPerceptron, pixels, widths, pixels, activation, init=init)
    objective = ReconstructionError(output, distance, reduce)
    return NetworkTask(data, EquinoxNetwork(network), objective, batch_size, augment)


class VariationalAutoencoder(eqx.Module):
    """An encoder and a decoder; from an image and standard normal numbers, one per latent variable.

    Returns means and logarithms of standard deviations, of latent variables and of pixels; those
    of pixels are clipped to -10 and 10, with `clip` those of latent variables too.
    """

    encoder: MultilayerPerceptron
    decoder: MultilayerPerceptron
    clip: bool = eqx.field(static=True)

    def __init__(
        self,
        pixels: int,
        encoder: tuple[int, ...],
        decoder: tuple[int, ...],
        activation: Callable[[Array], Array],
        key: Key,
        init: Init,
        clip: bool,
    ) -> None:
        (*hidden, latent), keys = encoder, jax.random.split(key)
        sizes = (pixels, tuple(hidden), 2 * latent), (latent, decoder, 2 * pixels)
        self.encoder, self.decoder = (
            MultilayerPerceptron(*size, activation, key, init=init)
            for size, key in zip(sizes, keys, strict=True)
        )
        self.clip = clip

    def __call__(
        self, inputs: tuple[Float[Array, " pixels"], Float[Array, " latent"]]
    ) -> tuple[Float[Array, "2 latent"], Float[Array, "2 pixels"]]:
        """Returns the moments of latent variables and of pixels."""
        encoded = self.encoder(inputs[0]).reshape(2, -1)
        encoded = jnp.clip(encoded, -10, 10) if self.clip else encoded
        decoded = self.decoder(encoded[0] + jnp.exp(encoded[1]) * inputs[1])
        return encoded, jnp.clip(decoded, -10, 10).reshape(2, -1)


class EvidenceLowerBound(eqx.Module):
    """The objective of variational autoencoders: "loss", minus a lower bound of log p(x).

        -loss = E log p(x | z) - KL(q(z | x), p(z))

    E is one draw of z from q(z | x); p(z) is standard normal. p(x | z) is the density of a normal
    at a random place within each pixel's bin, times the width 1 / 255 of a bin.

    Attributes:
        latent: the number of latent variables.
    """

    latent: int = eqx.field(static=True)

    def __call__(self, predict: Predict, rows: Rows) -> dict[str, Scalar]:
        """Returns the loss and its two parts, "log_likelihood" and "kl"."""
        pixels = flatten(rows)
        normal_key, bin_key = jax.random.split(rows.key)
        normal = jax.random.normal(normal_key, (len(pixels), self.latent), pixels.dtype)
        latents, outputs = predict((pixels, normal))
        mean, log_sigma = latents[:, 0], latents[:, 1]
        kl = rows.mean(jnp.sum((jnp.exp(2 * log_sigma) + mean**2 - 1) / 2 - log_sigma, axis=1))
        within = jax.random.uniform(bin_key, pixels.shape, pixels.dtype, -BIN / 2, BIN / 2)
        mean, log_sigma = outputs[:, 0], outputs[:, 1]
        scaled = ((pixels + within).astype(mean.dtype) - mean) * jnp.exp(-log_sigma)
        densities = -(scaled**2) / 2 - log_sigma - math.log(2 * math.pi) / 2
        log_likelihood = rows.mean(jnp.sum(densities + math.log(BIN), axis=1))
        return {"loss": kl - log_likelihood, "log_likelihood": log_likelihood, "kl": kl}


def variational_autoencoder(
    data: Data,
    encoder: tuple[int, ...] = (128, 32),
    decoder: tuple[int, ...] = (128,),
    activation: Callable[[Array], Array] = jax.nn.relu,
    batch_size: int = 128,
    init: Init = "truncated_normal",
    augment: Augment | None = None,
    clip: bool = True,
) -> NetworkTask:
    """Returns a variational autoencoder of images, see `EvidenceLowerBound`.

    Other arguments are those of `mlp_classification`.

    Args:
        encoder: the length of each hidden layer, and last the number of latent variables.
        decoder: the length of each hidden layer.
        clip: whether outputs of the encoder are clipped to -10 and 10, as those of the decoder are,
            so that losses are finite.
    """
    if not encoder:
        raise ValueError(
            "variational_autoencoder(encoder=()) must end with the number of latent variables; "
            "try encoder=(128, 32)."
        )
    sizes = math.prod(image_shape(data)), encoder, decoder, activation
    network = EquinoxNetwork(Build(VariationalAutoencoder, *sizes, init=init, clip=clip))
    return NetworkTask(data, network, EvidenceLowerBound(encoder[-1]), batch_size, augment, True)
