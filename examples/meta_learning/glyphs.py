"""Characters in many handwritings without a download: the DejaVu fonts that matplotlib ships.

A character is a class, a face is a writer. Meta-training sees Latin, Cyrillic and the digits, each
also rotated by 90, 180 and 270 degrees as three further classes; Greek, unrotated, is for
validation, Armenian and Georgian, unrotated, are for the test.
"""

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageFont

PIXELS = 14
RENDERED = 56  # font size before scaling down
LOOK_ALIKE = 0.88  # correlation from which on two characters count as one
TRAIN = ("LATIN", "CYRILLIC", "DIGIT")
VALIDATION = ("GREEK",)
TEST = ("ARMENIAN", "GEORGIAN")


class Characters(NamedTuple):
    """Three disjoint sets of classes: grey images, uint8 [class, writer, pixel, pixel]."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    test_name: str

    def save(self, path: Path) -> None:
        np.savez(path, **self._asdict())

    @staticmethod
    def saved(path: Path) -> "Characters":
        with np.load(path) as arrays:
            return Characters(**arrays)


def load() -> Characters:
    """Render the three sets, without look-alikes within one or between any two.

    A character that looks the same upside down, such as o or X, is not turned by 90 degrees: only
    the slant of a face would tell it from itself.
    """
    files = font_files()
    letters = shared_letters(files)
    images = render(letters, files)
    upright, greek, unseen = (images[of_script(letters, s)] for s in (TRAIN, VALIDATION, TEST))
    turned = rotations(upright)
    half_turned = np.rot90(upright, 2, axes=(2, 3))
    symmetric = similarity(upright, half_turned).diagonal() > LOOK_ALIKE
    train = distinct(np.concatenate([upright[symmetric], rotations(upright[~symmetric])]))
    validation = distinct(greek, turned)
    test = distinct(unseen, np.concatenate([turned, validation]))
    return Characters(train, validation, test, "Armenian and Georgian")


def font_files() -> list[Path]:
    """The twelve DejaVu faces; the two Display fonts have a few symbols only."""
    folder = Path(mpl.get_data_path(), "fonts", "ttf")
    files = sorted(f for f in folder.glob("DejaVu*.ttf") if "Display" not in f.name)
    if not files:
        raise SystemExit(f"no DejaVu fonts in {folder}: is matplotlib installed completely?")
    return files


def shared_letters(files: Iterable[Path]) -> list[str]:
    """The letters and digits that every face has and that are not composed of others (as é is)."""
    shared = set.intersection(*(set(FT2Font(str(file)).get_charmap()) for file in files))
    return [char for char in map(chr, sorted(shared)) if is_plain_letter(char)]


def is_plain_letter(char: str) -> bool:
    category = unicodedata.category(char)
    return (category[0] == "L" or category == "Nd") and not unicodedata.decomposition(char)


def of_script(letters: Iterable[str], scripts: tuple[str, ...]) -> list[bool]:
    """Which letters belong to these scripts: the first word of a character's Unicode name."""
    return [unicodedata.name(char).split()[0] in scripts for char in letters]


def render(letters: Iterable[str], files: Iterable[Path]) -> np.ndarray:
    """Every letter in every face."""
    basic = ImageFont.Layout.BASIC  # the same on every machine
    fonts = [ImageFont.truetype(str(file), RENDERED, layout_engine=basic) for file in files]
    return np.stack([[glyph(font, letter) for font in fonts] for letter in letters])


def glyph(font: ImageFont.FreeTypeFont, letter: str) -> np.ndarray:
    """One letter, cropped, scaled to fill the image but for a margin of a pixel, and centred.

    Its sides are even, like the image's, so that turning the image keeps it in the centre.
    """
    mask = font.getmask(letter, mode="L")
    ink = Image.frombytes("L", mask.size, bytes(mask))
    ink = ink.crop(ink.getbbox())
    scale = (PIXELS - 2) / max(ink.size)
    width, height = (2 * max(1, round(length * scale / 2)) for length in ink.size)
    image = Image.new("L", (PIXELS, PIXELS))
    image.paste(
        ink.resize((width, height), Image.Resampling.LANCZOS),
        ((PIXELS - width) // 2, (PIXELS - height) // 2),
    )
    return np.asarray(image)


def rotations(images: np.ndarray) -> np.ndarray:
    """The classes and, as further ones, their rotations by 90, 180 and 270 degrees."""
    return np.concatenate([np.rot90(images, quarter, axes=(2, 3)) for quarter in range(4)])


def distinct(images: np.ndarray, seen: np.ndarray | None = None) -> np.ndarray:
    """Leave out every class that looks like an earlier one of `images`, or like one of `seen`.

    So А and Α go where A is, the rotations of o where o is, and 9 where a rotated 6 is.
    """
    alike = similarity(images, images) > LOOK_ALIKE
    keep = np.ones(len(images), dtype=bool)
    if seen is not None:
        keep = (similarity(images, seen) <= LOOK_ALIKE).all(axis=1)
    for i in range(len(images)):
        if keep[i]:
            keep[i + 1 :] &= ~alike[i, i + 1 :]
    return images[keep]


def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The correlation of every class of `a` with every class of `b`, averaged over the faces."""
    return standardised(a) @ standardised(b).T / a.shape[1]


def standardised(images: np.ndarray) -> np.ndarray:
    """Each image with mean 0 and norm 1; one row per class."""
    flat = images.reshape(*images.shape[:2], -1).astype(np.float32)
    flat -= flat.mean(axis=-1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=-1, keepdims=True)
    return flat.reshape(len(images), -1)
