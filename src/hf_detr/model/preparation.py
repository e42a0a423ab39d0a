"""A copy of a model that only predicts, and does so as fast as the hardware allows."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class _Widen:
    """A hook that brings what a module reads to a wider dtype."""

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
        raise ValueError(f'There is no dtype "{dtype}" to compute in. Say "bfloat16", "float16" or "float32".')
    return named


def prepare(model: Model, dtype: torch.dtype | str | None, compile: bool) -> Model:
    """See [`DetrForDetection.prepare_for_inference`]."""
    dtype = named_dtype(dtype)
    prepared: Any = deepcopy(model).eval().requires_grad_(False)
    inner = prepared.model
    compilable = inner.backbone.model, inner.encoder, inner.decoder
    for part in compilable:
        if isinstance(part.__dict__.get("forward"), _Compiled):  # of the weights that were compiled, not of these
            del part.forward
    inner.backbone.prepare_for_inference()
    prepared.to(dtype or model.dtype)
    # what is said about a box needs more than bfloat16's 256 places between 0.5 and 1, and costs next to nothing
    wide = torch.promote_types(prepared.dtype, torch.float32)
    class_head = prepared.class_labels_classifier.to(wide)
    class_head.register_forward_pre_hook(_Widen(wide))
    (prepared.bbox_predictor or inner.decoder.bbox_predictor).to(wide)  # which widens what it reads by itself
    if compile:
        # parts, since what lies between them depends on the data: which images have equal sizes
        for part in compilable:
            part.forward = _Compiled(part.forward)
    prepared.is_prepared = True
    return prepared


class _Compiled:
    """A function compiled when it is called, for any shapes, with freezing: weights become constants, laid out once as
    the kernels want them. `torch.compile` takes freezing among its options, but looks for it elsewhere while it traces;
    and without `no_grad` it does not freeze."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.compiled = torch.compile(function, dynamic=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from torch._inductor import config

        with torch.no_grad(), config.patch(freezing=True):
            return self.compiled(*args, **kwargs)
