"""A copy of a model that only predicts, and does so as fast as the hardware allows."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def prepare(model: Model, dtype: torch.dtype | None, compile: bool) -> Model:
    """See [`DetrForDetection.prepare_for_inference`]."""
    prepared: Any = deepcopy(model).eval().requires_grad_(False)
    inner = prepared.model
    inner.backbone.prepare_for_inference()
    prepared.to(dtype or model.dtype)
    # what is said about a box needs more than bfloat16's 256 places between 0.5 and 1, and costs next to nothing
    wide = torch.promote_types(prepared.dtype, torch.float32)
    class_head = prepared.class_labels_classifier.to(wide)
    class_head.register_forward_pre_hook(lambda head, inputs: inputs[0].to(wide))
    (prepared.bbox_predictor or inner.decoder.bbox_predictor).to(wide)  # which widens what it reads by itself
    if compile:
        # parts, since what lies between them depends on the data: which images have equal sizes
        for part in (inner.backbone.model, inner.encoder, inner.decoder):
            part.forward = _compiled(part.forward)
    prepared.is_prepared = True
    return prepared


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled when it is called, for any shapes, with freezing: weights become constants, laid out once as the kernels
    want them. `torch.compile` takes freezing among its options, but looks for it elsewhere while it traces; and without
    `no_grad` it does not freeze."""
    from torch._inductor import config

    compiled = torch.compile(function, dynamic=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), config.patch(freezing=True):
            return compiled(*args, **kwargs)

    return call
