"""Images with their classes: scikit-learn's digits, idx files (MNIST's format), or a folder by class.

Pixels are scaled to [0, 1]; models get them less their mean, over their standard deviation, both of the
training images. Nothing is downloaded.

Shapes: N images, C channels, H and W pixels.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monge.lab.config import ExperimentConfig, VisionConfig
from monge.lab.examples import Examples
from monge.lab.image_corruptions import accuracies
from monge.lab.models import ImageShape

HELD_OUT = 5  # every fifth image of a set that comes in one part is validation
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_REMEDY = (
    "Name a folder of images by class (folder/CLASS/*.png) or idx files ('fashion-mnist/*-ubyte.gz', as of "
    "`apt-get install dataset-fashion-mnist`), or leave --images out for scikit-learn's digits."
)


@dataclass(frozen=True)
class Images:
    """Both parts of an image set, in [0, 1].

    Attributes:
        name: where it is from.
        train_NCHW, val_NCHW: float32 images.
        train_N, val_N: int64 classes.
        classes: their names.
        patch: side of a patch.
    """

    name: str
    train_NCHW: Tensor
    train_N: Tensor
    val_NCHW: Tensor
    val_N: Tensor
    classes: list[str]
    patch: int

    halved = 0

    @property
    def shape(self) -> ImageShape:
        """What a model must know."""
        return ImageShape(self.train_NCHW.shape[1], self.train_NCHW.shape[-1], len(self.classes))

    @property
    def domain_names(self) -> list[str]:
        """The classes."""
        return self.classes

    @property
    def tokens_per_example(self) -> int:
        """Patches, and the one token whose output is classified."""
        return (self.shape.size // self.patch) ** 2 + 1

    @cached_property
    def train(self) -> Examples:
        """Images as models get them."""
        return Examples(self.normalised(self.train_NCHW), self.train_N, self.train_N)

    @cached_property
    def val(self) -> Examples:
        """Images as models get them."""
        return Examples(self.normalised(self.val_NCHW), self.val_N, self.val_N)

    @cached_property
    def _moments(self) -> tuple[float, float]:
        pixels = self.train_NCHW.double()
        return float(pixels.mean()), max(float(pixels.std()), 1e-6)

    def normalised(self, images_NCHW: Tensor) -> Tensor:
        """Less the mean of the training images, over their standard deviation."""
        mean, std = self._moments
        return (images_NCHW - mean) / std

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all images and classes."""
        sha = hashlib.sha256()
        for part in (self.train_NCHW, self.train_N, self.val_NCHW, self.val_N):
            sha.update(part.contiguous().numpy().tobytes())
        return sha.hexdigest()

    @property
    def about(self) -> dict[str, Any]:
        """What ``config.json`` tells of the data."""
        channels, size, classes = self.shape
        return {
            "images": self.name,
            "train_images": len(self.train_N),
            "val_images": len(self.val_N),
            "classes": classes,
            "channels": channels,
            "size": size,
            "tokens_per_image": self.tokens_per_example,
            "note": "",
            "digest": self.digest,
        }

    def robustness(self, model: nn.Module, config: ExperimentConfig) -> dict[str, Any]:
        """``accuracy``, of the validation images as they are; ``corrupted``: under every corruption and
        strength; ``accuracy_corrupted``, the mean of those."""
        clean, corrupted = accuracies(model, self.val_NCHW, self.val_N, self.normalised, config)
        values = [value for by_strength in corrupted.values() for value in by_strength.values()]
        return {
            "accuracy": clean,
            "accuracy_corrupted": sum(values) / len(values),
            "corrupted": corrupted,
        }


def load_images(config: VisionConfig) -> Images:
    """The images that ``config`` names.

    Raises:
        ValueError: there are none, they do not fit each other or the patches; the remedy is named.
        ImportError: scikit-learn (for the digits) or Pillow (for a folder) is not installed.
    """
    paths = [Path(os.path.expanduser(name)) for name in config.images]
    if not paths:
        name, parts = "scikit-learn digits", _halves(*_digits())
        classes = [str(digit) for digit in range(10)]
    elif len(paths) == 1 and paths[0].is_dir() and any(child.is_dir() for child in paths[0].iterdir()):
        pictures_NCHW, labels_N, classes = _folder(paths[0], config.image_size)
        name, parts = str(paths[0]), _halves(pictures_NCHW, labels_N)
    else:
        name, (parts, classes) = " ".join(config.images), _idx(config.images)
    (train_NCHW, train_N), (val_NCHW, val_N) = parts
    if config.image_size:
        train_NCHW, val_NCHW = (_scaled(part, config.image_size) for part in (train_NCHW, val_NCHW))
    height, width = train_NCHW.shape[2:]
    if height != width or height % config.patch:
        raise ValueError(
            f"images of {height} x {width} pixels cannot be cut into patches of {config.patch}: give "
            "--image-size, a multiple of --patch, to scale them to a square."
        )
    train_NCHW, train_N = _at_most(config.max_images, train_NCHW, train_N)
    val_NCHW, val_N = _at_most(config.max_val_images, val_NCHW, val_N)
    return Images(name, train_NCHW, train_N, val_NCHW, val_N, classes, config.patch)


def _at_most(count: int, images_NCHW: Tensor, labels_N: Tensor) -> tuple[Tensor, Tensor]:
    """So many of the images, drawn at random, always the same ones; all where there are no more."""
    if len(labels_N) <= count:
        return images_NCHW, labels_N
    rows = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(0))[:count]
    return images_NCHW[rows], labels_N[rows]


def _digits() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits need scikit-learn: `pip install 'monge[vision]'`, or name images with --images."
        ) from error
    digits = load_digits()
    return torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target).long()


def _halves(images_NCHW: Tensor, labels_N: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Training and validation: of the images in a fixed random order, every fifth is validation."""
    if len(labels_N) < 2 * HELD_OUT:
        raise ValueError(f"{len(labels_N)} images are too few to train on. {_REMEDY}")
    order = torch.randperm(len(labels_N), generator=torch.Generator().manual_seed(0))
    held = torch.arange(len(order)) % HELD_OUT == HELD_OUT - 1
    return [(images_NCHW[rows], labels_N[rows]) for rows in (order[~held], order[held])]


def _folder(root: Path, size: int) -> tuple[Tensor, Tensor, list[str]]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("a folder of images needs Pillow: `pip install 'monge[lab]'`.") from error
    classes = sorted(child.name for child in root.iterdir() if child.is_dir())
    pictures, labels = [], []
    for label, name in enumerate(classes):
        files = [p for p in sorted((root / name).rglob("*")) if p.suffix.lower() in PICTURES]
        if not files:
            raise ValueError(f"the folder {root / name} of a class holds no image. {_REMEDY}")
        for path in files:
            try:
                with Image.open(path) as image:
                    pixels = image.convert("RGB")
                    if size:
                        pixels = pixels.resize((size, size), Image.Resampling.BILINEAR)
                    values = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8)
                    pictures.append(values.view(pixels.height, pixels.width, 3))
            except OSError as error:
                raise ValueError(f"{path} is no image that Pillow can read ({error}). Remove it.") from error
            labels.append(label)
    shapes = {tuple(picture.shape) for picture in pictures}
    if len(shapes) > 1:
        raise ValueError(f"the images in {root} have {len(shapes)} sizes: scale them with --image-size.")
    return torch.stack(pictures).permute(0, 3, 1, 2).float() / 255, torch.tensor(labels), classes


def _idx(patterns: Sequence[str]) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """Images (three dimensions) and labels (one) of the same length in pairs; a second pair is validation."""
    names = [name for pattern in patterns for name in sorted(glob.glob(os.path.expanduser(pattern)))]
    names = [
        str(p) for n in names for p in (sorted(Path(n).glob("*ubyte*")) if Path(n).is_dir() else [Path(n)])
    ]
    if not names:
        raise ValueError(f"images {' '.join(patterns)!r} match no file. {_REMEDY}")
    arrays = [(name, read_idx(Path(name))) for name in names]
    images = {name: array for name, array in arrays if array.ndim >= 3}
    labels = {name: array for name, array in arrays if array.ndim == 1}
    pairs = []
    for name, array in images.items():
        mates = [other for other, array_N in labels.items() if len(array_N) == len(array)]
        mates = [m for m in mates if os.path.basename(m)[:5] == os.path.basename(name)[:5]] or mates
        if len(mates) != 1:
            raise ValueError(
                f"{name} has {len(array)} images, and {len(mates)} label files fit it. {_REMEDY}"
            )
        pairs.append((array.float()[:, None] / 255, labels[mates[0]].long()))
    pairs.sort(key=lambda pair: -len(pair[1]))  # the training part is the larger
    if not 1 <= len(pairs) <= 2:
        raise ValueError(f"{len(pairs)} idx files of images are neither one set nor its two parts. {_REMEDY}")
    parts = pairs if len(pairs) == 2 else _halves(*pairs[0])
    return parts, [str(label) for label in range(1 + max(int(labels_N.max()) for _, labels_N in pairs))]


def read_idx(path: Path) -> Tensor:
    """The array of an idx file of bytes, gzipped or not.

    Raises:
        ValueError: the file cannot be read, or is something else.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}. {_REMEDY}") from error
    dims = data[3] if len(data) > 3 else 0
    sizes = struct.unpack(f">{dims}I", data[4 : 4 + 4 * dims]) if len(data) >= 4 + 4 * dims else ()
    if data[:3] != b"\0\0\x08" or not dims or len(data) != 4 + 4 * dims + torch.Size(sizes).numel():
        raise ValueError(f"{path} is no idx file of bytes (MNIST's format). {_REMEDY}")
    return torch.frombuffer(bytearray(data[4 + 4 * dims :]), dtype=torch.uint8).view(sizes)


def _scaled(images_NCHW: Tensor, size: int) -> Tensor:
    if images_NCHW.shape[2:] == (size, size):
        return images_NCHW
    scaled = F.interpolate(
        images_NCHW, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )
    return scaled.clamp(0, 1)
