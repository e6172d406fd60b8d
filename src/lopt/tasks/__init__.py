"""Tasks: what optimizers are asked to do, and families to draw them from."""

from lopt.tasks.augment import InitialScale, InputScale, Reparameterization, WarmStart
from lopt.tasks.batch_norm import BatchNormClassification
from lopt.tasks.classification import Classification, MultilayerPerceptron, mlp_classification
from lopt.tasks.convolutional import ConvolutionalNetwork, conv_classification
from lopt.tasks.data import Examples, ImageData, Labelled, image_data, resize
from lopt.tasks.landscapes import Ackley, Beale, Rosenbrock, StyblinskiTang
from lopt.tasks.quadratics import Quadratic, QuadraticFamily
from lopt.tasks.residual_network import ResidualNetwork
from lopt.tasks.resnet import ResidualClassification, resnet_classification
from lopt.tasks.subsets import Choice, DataSubset

__all__ = [
    "Ackley",
    "BatchNormClassification",
    "Beale",
    "Choice",
    "Classification",
    "ConvolutionalNetwork",
    "DataSubset",
    "Examples",
    "ImageData",
    "InitialScale",
    "InputScale",
    "Labelled",
    "MultilayerPerceptron",
    "Quadratic",
    "QuadraticFamily",
    "Reparameterization",
    "ResidualClassification",
    "ResidualNetwork",
    "Rosenbrock",
    "StyblinskiTang",
    "WarmStart",
    "conv_classification",
    "image_data",
    "mlp_classification",
    "resize",
    "resnet_classification",
]
