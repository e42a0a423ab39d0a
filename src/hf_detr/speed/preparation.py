"""A copy of a model that predicts as fast as the processor allows, and a model that trains as fast."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..model.modeling_hf_detr import DetrForDetection
from ..model.segmentation import DetrForSegmentation
from .depthwise import widen
from .fast_attention import use_fast_attention
from .folding import fold, fuse
from .linear import use_fast_linear
from .memory_format import use_memory_format


class PreparedDetr(DetrForDetection):
    """What [`prepare_for_inference`] returns: a [`DetrForDetection`] whose weights belong to no checkpoint."""

    def train(self, mode: bool = True) -> Self:
        if mode:
            raise ValueError("This copy was prepared for prediction. Train the model that it was made from.")
        return super().train(mode)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("This copy was prepared for prediction. Save the model that it was made from.")


class PreparedDetrWithMasks(PreparedDetr, DetrForSegmentation):
    """The same of a [`DetrForSegmentation`]."""


def prepare_for_inference(
    model: DetrForDetection, dtype: torch.dtype | str | None = None, compile: bool = False
) -> PreparedDetr:
    """A faster copy that only predicts, called like the model, with the same outputs (to 1e-4 in float32).

    Batch norm is folded into the convolutions, which run in channels-last, and on a CPU linear layers and attention use
    the faster kernels. The model stays as it is. `pipeline("object-detection")`, predict.py and evaluate.py use such a
    copy.

    Args:
        dtype: of weights and activations, also by name; None: the model's own. On a CPU with AMX or AVX-512 BF16
            `torch.bfloat16` is several times faster. Heads and outputs have at least float32.
        compile: with `torch.compile`, for any image size. The first calls take minutes.

    Raises:
        ValueError: there is no such `dtype`.
    """
    dtype = named_dtype(dtype)
    prepared: Any = deepcopy(model).eval().requires_grad_(False)
    prepared.__class__ = PreparedDetrWithMasks if isinstance(model, DetrForSegmentation) else PreparedDetr
    backbone, encoder, decoder = prepared.model.backbone, prepared.model.encoder, prepared.model.decoder
    compilable = backbone.model, encoder, decoder
    for part in compilable:
        if isinstance(part.__dict__.get("forward"), _Compiled):  # of the weights that were compiled, not of these
            del part.forward
    backbone.to(torch.promote_types(model.dtype, torch.float32))  # to fold with all digits
    fuse(backbone)
    backbone.model.to(memory_format=use_memory_format(backbone.model))
    use_fast_linear(prepared)
    use_fast_attention(prepared)
    prepared.to(dtype or model.dtype)
    # scores and box coordinates need more than bfloat16's 256 values between 0.5 and 1; the heads cost next to nothing
    wide = torch.promote_types(prepared.dtype, torch.float32)
    class_head = prepared.class_labels_classifier.to(wide)
    class_head.register_forward_pre_hook(_Widen(wide))
    prepared.bbox_predictor.to(wide)  # which widens its input by itself
    if compile:
        # parts, since the code between them depends on the data: which images have equal sizes
        for part in compilable:
            part.forward = _Compiled(part.forward)
    return prepared


def prepare_for_training(model: DetrForDetection) -> None:
    """Make a model train faster, in place, with the same names and values of the weights and the same losses.

    Convolutions apply the frozen batch norms after them and run in channels-last, and on a CPU linear layers,
    attention and depthwise convolutions use the faster kernels.

    What binds modules together raises instead of computing something else: replacing a convolution afterwards,
    `nn.DataParallel`, and offloading.
    """
    fold(model.model.backbone)
    widen(model.model.backbone.model)
    use_memory_format(model.model.backbone.model)
    use_fast_linear(model)
    use_fast_attention(model)


class _Widen:
    """A hook that brings the input of a module to a wider dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0].to(self.dtype)


def named_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype that may be given by name.

    Raises:
        ValueError: there is none of that name.
    """
    if not isinstance(dtype, str):
        return dtype
    named = getattr(torch, dtype.removeprefix("torch."), None)
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f'There is no dtype "{dtype}" to compute in. Use "bfloat16", "float16" or "float32".')
    return named


class _Compiled:
    """A function compiled at its first call, for any shapes, with freezing: weights become constants, laid out once as
    the kernels need them. `torch.compile` accepts freezing among its options, but reads it elsewhere while it traces;
    and without `no_grad` it does not freeze."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.compiled = torch.compile(function, dynamic=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch._inductor import config

        with torch.no_grad(), config.patch(freezing=True):
            return self.compiled(*args, **kwargs)
