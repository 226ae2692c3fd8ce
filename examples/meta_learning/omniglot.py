"""The real Omniglot (Lake, Salakhutdinov and Tenenbaum, 2015), from files already there."""

from itertools import groupby

import numpy as np
from glyphs import Characters, rotations
from PIL import Image

PIXELS = 28
WRITERS = 20
VALIDATION_CLASSES = 100


def load(root: str) -> Characters:
    """The background set, rotations as further classes, for training; the evaluation set for test.

    The last classes of the background set are kept for validation, unrotated.
    """
    background, evaluation = read(root, background=True), read(root, background=False)
    train, validation = np.split(background, [-VALIDATION_CLASSES])
    return Characters(rotations(train), validation, evaluation, "Omniglot's evaluation set")


def read(root: str, *, background: bool) -> np.ndarray:
    """White ink on black, as in the glyphs: uint8 of shape [class, writer, pixel, pixel]."""
    try:
        from torchvision.datasets import Omniglot
    except ImportError:
        raise SystemExit("--data omniglot needs torchvision: pip install torchvision") from None
    try:
        samples = Omniglot(root, background=background, transform=shrink)
    except RuntimeError:
        raise SystemExit(
            f"no Omniglot under {root}: torchvision.datasets.Omniglot(root, background=...,"
            " download=True) fetches it, once with background=True and once with False"
        ) from None
    classes = groupby(map(samples.__getitem__, range(len(samples))), key=lambda sample: sample[1])
    return np.stack([[image for image, _ in members] for _, members in classes])


def shrink(image: Image.Image) -> np.ndarray:
    return 255 - np.asarray(image.convert("L").resize((PIXELS, PIXELS), Image.Resampling.BOX))
