"""A map of weights laid over an image."""

import numpy as np
from PIL import Image
from torch import Tensor

# dark blue to yellow, increasing in brightness, so that the order is kept in greyscale
COLOURS = np.array([(13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33)], dtype=np.float32)
MAX_OPACITY = 0.75


def draw_heat(image: Image.Image, weights: Tensor) -> Image.Image:
    """A copy of the image, grey and dimmed, with a heat map over all of it. Opacity and brightness grow with the
    weight; the largest is yellow at an opacity of 0.75.

    Args:
        weights: (h, w), at least 0, on the CPU; any scale.
    """
    largest = float(weights.max())
    scaled = (weights / largest if largest > 0 else weights).numpy().astype(np.float32)
    smooth = Image.fromarray(scaled).resize(image.size, Image.Resampling.BICUBIC)
    heat = np.clip(np.asarray(smooth), 0, 1)
    channels = [np.interp(heat, np.linspace(0, 1, len(COLOURS)), COLOURS[:, channel]) for channel in range(3)]
    opacity = MAX_OPACITY * np.sqrt(heat)[..., None]
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None] * 0.6
    mixed = grey * (1 - opacity) + np.stack(channels, axis=-1) * opacity
    return Image.fromarray(mixed.round().astype(np.uint8))
