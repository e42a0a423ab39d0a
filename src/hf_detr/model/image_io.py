"""Any image to a tensor of the model's channels: what step 1 does before it resizes."""

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from torch import Tensor
from transformers.image_transforms import convert_to_rgb

Image = PIL.Image.Image | np.ndarray | Tensor | str | Path | bytes | Mapping[str, Any]
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's "L"
OVERSHOOT = 0.1  # fraction of the range by which floats may exceed it
MIN_BYTES = 16  # largest value from which on floats are taken for bytes
EXIF_ORIENTATION = 0x0112
TURNED_BY_90_DEGREES = (5, 6, 7, 8)


@dataclass(frozen=True)
class ImageHeader:
    """What an image file tells without being decoded.

    Args:
        size: (width, height) in pixels of the image as shown, EXIF orientation applied.
        stored: (width, height) of the pixels as they are stored.
        orientation: the EXIF orientation, 1 to 8; 1 is upright.
        problem: why the file cannot be opened, or None.
    """

    size: tuple[int, int] = (0, 0)
    stored: tuple[int, int] = (0, 0)
    orientation: int = 1
    problem: str | None = None


def read_image_header(file: str | Path | BinaryIO) -> ImageHeader:
    """Size and orientation of an image file (a path or an open file), without decoding it."""
    try:
        with PIL.Image.open(file) as image:
            stored, orientation, format_ = image.size, image.getexif().get(EXIF_ORIENTATION, 1), image.format
    except FileNotFoundError:
        return ImageHeader(problem="there is no such file")
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        return ImageHeader(problem=f"cannot be opened as an image: {error}")
    turned = orientation in TURNED_BY_90_DEGREES and format_ != "TIFF"  # Pillow reports a TIFF's size already turned
    return ImageHeader(stored[::-1] if turned else stored, stored, orientation)


def flat_list_of_images(images: Any) -> list[Any]:
    """One image, a list, nested lists, or a batch array (B, ...) to a flat list."""
    if isinstance(images, (list, tuple)):
        return [image for entry in images for image in flat_list_of_images(entry)]
    if isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        return list(images)
    return [images]


def open_image(source: str | Path, timeout: float | None = None) -> PIL.Image.Image:
    """A path, URL, data URI or base64 string to a PIL image, fully read, turned as its EXIF orientation says.

    Args:
        timeout: seconds to wait for a URL; None waits as long as it takes.

    Raises:
        FileNotFoundError: a path that does not exist.
        ValueError: what is there is not an image, or is truncated.
    """
    text = str(source)
    name = text if len(text) < 200 else f"{text[:60]}... ({len(text)} characters)"
    file: Path | BytesIO
    if text.startswith(("http://", "https://")):
        file = BytesIO(httpx.get(text, timeout=timeout, follow_redirects=True).raise_for_status().content)
    elif text.startswith("data:image/"):
        file = BytesIO(base64.b64decode(text.partition(",")[2]))
    elif _is_file(text):
        file = Path(text)
    else:
        try:
            file = BytesIO(base64.b64decode(text, validate=True)) if isinstance(source, str) else BytesIO()
        except ValueError:
            file = BytesIO()
        if file.getbuffer().nbytes < 16:  # less than any image file
            raise FileNotFoundError(f"No image at {name}.")
    try:
        with PIL.Image.open(file) as image:
            image.load()
            PIL.ImageOps.exif_transpose(image, in_place=True)  # a copy of a large photograph takes long
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error
    return image


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # longer than a name can be
        return False


def to_image_tensor(
    image: Image,
    timeout: float | None = None,
    *,
    num_channels: int = 3,
    image_range: tuple[float, float] | None = None,
    do_rescale: bool = True,
    channels_last: bool | None = None,
) -> Tensor:
    """Any image to (C, H, W): uint8, or float32 in [0, 1] if it came as floats in [0, 1].

    One rule holds for all kinds of images: 8-bit values are taken as they are. Wider integers (uint16, int32, and the
    modes I;16 and I of PIL) are 0 to 255 if no value of the image is above 255, and 0 to 65535 if none is above 65535.
    Floats are in [0, 1] if no value is above 1, and in [0, 255] if the largest is above 16, or all are integers; what
    exceeds these ranges by up to a tenth, as after a bicubic resize, is clipped. All other values are refused.

    Args:
        num_channels: 3 makes RGB of all images, with transparency over white; 1 makes grey (ITU-R 601 weights). Any
            other number takes images that have this number, as they are.
        image_range: the values of black and white in images that are not 8-bit, in place of the rule; values outside
            are clipped. (0, 4095) is for sensors of 12 bits.
        do_rescale: False takes all values as they are, in float32 if they are not bytes.
        channels_last: whether arrays are (H, W, C); None decides by their shape.

    Raises:
        ValueError: not an image, or one with NaN, with no pixels, with values that the rule does not have, or with
            channels that cannot be understood.
        TypeError: not a kind of object that can hold an image.
    """
    if isinstance(image, (str, Path, bytes, Mapping)):
        image = _open_any(image, timeout)
    tensor, channels_last = _to_tensor(image, num_channels, channels_last)
    tensor = _channels_first(tensor, num_channels, channels_last)
    if tensor.dtype == torch.bool:
        tensor = tensor.to(torch.uint8) * 255
    elif tensor.dtype != torch.uint8:
        tensor = _scale_values(tensor, image_range, do_rescale)
    return _with_channels(tensor, num_channels)


def _to_tensor(image: Any, num_channels: int, channels_last: bool | None) -> tuple[Tensor, bool | None]:
    """A PIL image, an array or a tensor as a tensor that PyTorch can calculate with, and where its channels are."""
    if isinstance(image, Tensor):
        return image.to(torch.int32) if image.dtype == torch.uint16 else image, channels_last
    if isinstance(image, PIL.Image.Image):
        image, channels_last = _pil_to_array(image, num_channels), True
    if not isinstance(image, np.ndarray):
        raise TypeError(
            "An image must be a PIL image, a numpy array, a torch tensor, bytes, a path or a URL, not "
            f"{type(image).__name__}."
        )
    if not (np.issubdtype(image.dtype, np.number) or image.dtype == np.bool_):
        raise TypeError(f"Arrays of dtype {image.dtype} are not supported as images.")
    if image.dtype == np.uint16:
        image = image.astype(np.int32)
    return torch.from_numpy(np.require(image, requirements=["C", "W"])), channels_last


def _open_any(image: Any, timeout: float | None) -> PIL.Image.Image:
    """A path, URL, the content of a file, or a dict with `bytes` or `path` as `datasets` has them."""
    if isinstance(image, Mapping):
        source = image.get("bytes") if image.get("bytes") is not None else image.get("path")
        if source is None:
            raise ValueError(f"An image that is a dict must have bytes or a path, got the keys {sorted(image)}.")
        image = source
    if isinstance(image, bytes):
        try:
            opened = PIL.Image.open(BytesIO(image))
            opened.load()
            return opened
        except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            reason = re.sub(r"^cannot identify image file .*", "not an image file", str(error))
            raise ValueError(f"{len(image)} bytes cannot be read as an image: {reason}") from error
    return open_image(image, timeout)


def _pil_to_array(image: PIL.Image.Image, num_channels: int) -> np.ndarray:
    """(H, W) or (H, W, C), turned as the EXIF orientation says."""
    image.load()  # an orientation may be stored after the pixels
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = PIL.ImageOps.exif_transpose(image)
    if min(image.size) == 0:
        raise ValueError(f"The image has no pixels: {image.width} x {image.height}.")
    if image.mode.startswith("I"):  # "I;16" and its relatives, and "I", in which Pillow holds 16-bit grey as well
        return np.array(image).astype(np.int32)
    if image.mode == "F":
        return np.array(image)
    if num_channels not in (1, 3) or (image.mode == "RGB" and image.info.get("transparency") is None):
        return np.array(image)
    return convert_to_rgb(image, return_numpy=True)


def _channels_first(image: Tensor, num_channels: int, channels_last: bool | None) -> Tensor:
    """(H, W), (H, W, C) or (C, H, W) to (C, H, W)."""
    if image.ndim == 2:
        image, channels_last = image[None], False
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"An image array must be (H, W), (H, W, C) or (C, H, W), got {tuple(image.shape)}.")
    channels = (1, 2, 3, 4) if num_channels in (1, 3) else (num_channels,)
    if channels_last is None:
        # where both ends could be channels, the last one is meant, as images are stored, unless only the first can be
        # the wanted number
        only_first = image.shape[0] == num_channels and image.shape[2] != num_channels
        channels_last = image.shape[2] in channels and not only_first
    image = image.permute(2, 0, 1) if channels_last else image
    if image.shape[0] not in channels:
        raise ValueError(
            f"Neither the first nor the last axis of {tuple(image.shape)} can be channels "
            f"({'1 to 4' if len(channels) > 1 else f'num_channels={num_channels}'})."
        )
    return image


def _with_channels(image: Tensor, num_channels: int) -> Tensor:
    """The wanted number of channels, of an image with 1 to 4."""
    if num_channels not in (1, 3):
        return image
    if image.shape[0] in (2, 4):  # the last channel is transparency, over white as for PIL images
        opaque_is_one = image.is_floating_point() and bool(image[-1].max() <= 1 + OVERSHOOT)
        white = 1.0 if opaque_is_one else 255.0
        alpha = image[-1:].float() / white
        colour = image[:-1].float() * alpha + white * (1 - alpha)
        image = colour if image.is_floating_point() else colour.round().to(torch.uint8)
    if image.shape[0] == num_channels:
        return image
    if num_channels == 3:
        return image.expand(3, -1, -1)
    grey = (image.float() * torch.tensor(LUMA).to(image.device)[:, None, None]).sum(0, keepdim=True)
    return grey if image.is_floating_point() else grey.round().to(torch.uint8)


def _scale_values(image: Tensor, image_range: tuple[float, float] | None, do_rescale: bool) -> Tensor:
    """Values other than bytes to bytes; floats in [0, 1] stay."""
    floating = image.is_floating_point()
    if floating and not image.isfinite().all():
        raise ValueError("The image contains NaN or infinite values.")
    if image_range is not None:
        black, white = image_range
        if black == white:
            raise ValueError(f"image_range must be the values of black and white, got {image_range}.")
        scaled = (image.double() - black) * (255 / (white - black))
        return scaled.clamp(0, 255).round().to(torch.uint8)
    if not do_rescale:
        return image.float()
    low, high = (value.item() for value in image.aminmax())
    if not floating:
        if low < 0 or high > 65535:
            raise ValueError(
                f"Integer images must have values in [0, 255] or [0, 65535], got [{low}, {high}]. Set "
                "image_range=(black, white) to the values that are black and white."
            )
        return image.to(torch.uint8) if high <= 255 else (image.double() / 257).round().to(torch.uint8)
    if low >= -OVERSHOOT and high <= 1 + OVERSHOOT:
        return image.float().clamp(0, 1)
    in_bytes = high > MIN_BYTES and low >= -OVERSHOOT * high and high <= 255 * (1 + OVERSHOOT)
    if in_bytes or (low >= 0 and high <= 255 and bool((image == image.round()).all())):
        return image.round().clamp(0, 255).to(torch.uint8)
    raise ValueError(
        f"Float images must have values that fill [0, 1] or [0, 255]; [{low:.4g}, {high:.4g}] could be either, or "
        "something else. The processor normalises by itself; give it the image as it was before, or pass "
        "do_rescale=False and do_normalize=False. For images with another range, such as those of scientific "
        "instruments, set image_range=(black, white)."
    )


def allocate_batch(
    sizes: list[tuple[int, int]],
    channels: int = 3,
    size: tuple[int, int] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """A batch for images of these (height, width), to be filled from the top left.

    Args:
        size: (height, width) of the batch; None: the largest of both.

    Returns:
        `pixel_values` (B, channels, H, W), zeros, and `pixel_mask` (B, H, W) int64, 1 = image, 0 = padding.

    Raises:
        ValueError: an image does not fit `size`.
    """
    height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
    if size is not None and (height > size[0] or width > size[1]):
        raise ValueError(f"Images of up to {height} x {width} do not fit a batch of {size[0]} x {size[1]}.")
    height, width = size or (height, width)
    pixel_values = torch.zeros(len(sizes), channels, height, width, dtype=dtype, device=device)
    pixel_mask = torch.zeros(len(sizes), height, width, dtype=torch.int64, device=device)
    for mask, (h, w) in zip(pixel_mask, sizes, strict=True):
        mask[:h, :w] = 1
    return pixel_values, pixel_mask


def check_images(pixel_values: Tensor, pixel_mask: Tensor | None, num_channels: int) -> None:
    """Refuse what is no batch of images.

    Raises:
        ValueError: `pixel_values` is not (B, num_channels, H, W), or `pixel_mask` is not (B, H, W).
    """
    if pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        raise ValueError(
            f"`pixel_values` must be (batch, {num_channels}, height, width), got {tuple(pixel_values.shape)}. "
            "The image processor makes them."
        )
    expected = (pixel_values.shape[0], *pixel_values.shape[2:])
    if pixel_mask is not None and pixel_mask.shape != expected:
        raise ValueError(
            f"`pixel_mask` must be {tuple(expected)} to fit `pixel_values`, got {tuple(pixel_mask.shape)}."
        )
