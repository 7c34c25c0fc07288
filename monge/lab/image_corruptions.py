"""Corrupted images, each kind at three strengths, and the accuracy of a classifier under them.

Strengths are in units of the pixel range (noise, contrast, salt) or of the side of the image (blur,
occlusion, shift), so that they mean the same at every size. The same seed corrupts the images of every model
alike.

Shapes: N images, C channels, H and W pixels in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from monge.lab.config import ExperimentConfig
from monge.lab.models import evaluation_mode

Corruption = Callable[[Tensor, float, torch.Generator], Tensor]


def noise(images_NCHW: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise of standard deviation ``strength``, clipped."""
    drawn = torch.randn(images_NCHW.shape, generator=generator)
    return (images_NCHW + strength * drawn).clamp(0, 1)


def blur(images_NCHW: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur of standard deviation ``strength`` sides; the edge pixels go on outside."""
    side, channels = images_NCHW.shape[-1], images_NCHW.shape[1]
    sigma = strength * side
    reach = min(max(1, round(3 * sigma)), side - 1)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(channels, 1, 1)
    rows = F.pad(images_NCHW, (reach, reach, 0, 0), mode="replicate")
    rows = F.conv2d(rows, kernel[:, :, None], groups=channels)
    columns = F.pad(rows, (0, 0, reach, reach), mode="replicate")
    return F.conv2d(columns, kernel[..., None], groups=channels)


def contrast(images_NCHW: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Every pixel moved by the share ``strength`` of its way towards the mean of its image."""
    mean_N111 = images_NCHW.mean(dim=(1, 2, 3), keepdim=True)
    return images_NCHW.lerp(mean_N111, strength)


def occlusion(images_NCHW: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A square of ``strength`` sides at a random place is set to the mean of its image."""
    count, _, side, _ = images_NCHW.shape
    extent = max(1, round(strength * side))
    corner_N2 = torch.randint(side - extent + 1, (count, 2), generator=generator)
    pixels = torch.arange(side)
    inside = [(pixels >= corner_N2[:, d, None]) & (pixels < corner_N2[:, d, None] + extent) for d in (0, 1)]
    covered_N1HW = (inside[0][:, :, None] & inside[1][:, None, :])[:, None]
    return torch.where(covered_N1HW, images_NCHW.mean(dim=(1, 2, 3), keepdim=True), images_NCHW)


def shift(images_NCHW: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Moved by ``strength`` sides up, down, left or right; the edge pixels fill what is left free."""
    side = images_NCHW.shape[-1]
    by = max(1, round(strength * side))
    direction_N = torch.randint(4, (len(images_NCHW),), generator=generator)
    padded = F.pad(images_NCHW, (by, by, by, by), mode="replicate")
    moved = [
        padded[:, :, top : top + side, left : left + side]
        for top, left in ((0, by), (2 * by, by), (by, 0), (by, 2 * by))
    ]
    return torch.stack(moved)[direction_N, torch.arange(len(images_NCHW))]


def salt(images_NCHW: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """A share ``strength`` of the pixels is black or white, all channels of a pixel together."""
    N, _, H, W = images_NCHW.shape
    drawn_N1HW = torch.rand(N, 1, H, W, generator=generator)
    salted = torch.where(drawn_N1HW < strength / 2, 0.0, images_NCHW)
    return torch.where(drawn_N1HW > 1 - strength / 2, 1.0, salted)


CORRUPTIONS: dict[str, tuple[Corruption, tuple[float, ...]]] = {
    "noise": (noise, (0.1, 0.2, 0.4)),
    "blur": (blur, (0.05, 0.1, 0.2)),
    "contrast": (contrast, (0.5, 0.75, 0.9)),
    "occlusion": (occlusion, (0.25, 0.375, 0.5)),
    "shift": (shift, (0.125, 0.25, 0.375)),
    "salt": (salt, (0.05, 0.1, 0.2)),
}
"""Corruption -> function and strengths."""


def corrupted(images_NCHW: Tensor) -> Iterator[tuple[str, str, Tensor]]:
    """(corruption, strength, images) of all; the same for the same images."""
    for name, (corrupt, strengths) in CORRUPTIONS.items():
        for strength in strengths:
            generator = torch.Generator().manual_seed(sum(name.encode()))
            yield name, f"{strength:g}", corrupt(images_NCHW, strength, generator)


@torch.no_grad()
def accuracies(
    model: nn.Module,
    images_NCHW: Tensor,
    labels_N: Tensor,
    normalise: Callable[[Tensor], Tensor],
    config: ExperimentConfig,
) -> tuple[float, dict[str, dict[str, float]]]:
    """Share of the images whose class is the model's first choice: as they are, and corruption by
    corruption."""

    def accuracy(batch_NCHW: Tensor) -> float:
        hits = 0
        for rows in torch.arange(len(labels_N)).split(config.batch):
            choice_N = model(normalise(batch_NCHW[rows]).to(config.device)).logits.argmax(dim=-1).cpu()
            hits += int((choice_N == labels_N[rows]).sum())
        return hits / len(labels_N)

    table: dict[str, dict[str, float]] = {}
    with evaluation_mode(model):
        for name, strength, batch_NCHW in corrupted(images_NCHW):
            table.setdefault(name, {})[strength] = accuracy(batch_NCHW)
        return accuracy(images_NCHW), table
