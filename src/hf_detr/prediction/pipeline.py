"""`pipeline("object-detection")` and `pipeline("image-segmentation")` for our models: any image, and batches of images
of different sizes."""

from typing import Any

import datasets
import torch
from PIL import Image
from transformers import ImageSegmentationPipeline, ObjectDetectionPipeline, Pipeline
from transformers.utils import ModelOutput

from ..model.configuration_hf_detr import refuse_unknown
from ..model.image_io import allocate_batch
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.mask_post_processing import default_threshold
from ..model.modeling_hf_detr import DetrForDetection, DetrModel
from ..model.post_processing import to_host
from ..model.segmentation import DetrForSegmentation
from ..speed import PreparedDetr, prepare_for_inference


class _DetrPipeline(Pipeline):
    """What the pipelines of our models have in common. Images may also be numpy arrays, tensors and `Path`s, of any
    mode; `batch_size` > 1 takes images of different sizes and returns what single images return.

    Each image passes through the pipeline's loader in a list of its own, so that nothing tries to stack it, and is
    padded together with its batch in `_forward`.

    Predictions come from a faster copy of `model` (`hf_detr.speed.prepare_for_inference`), made at the first call and
    again when the weights have changed (but not through `.data`, which PyTorch does not count). It takes the memory of
    one more model. A model that was compiled, quantised, spread over devices, or has adapters or hooks is used
    as it is.
    """

    model: Any
    image_processor: DetrImageProcessor
    _prepared: Any = None
    _prepared_of: tuple[Any, ...] = ()

    def _predictor(self) -> Any:
        model = self.model
        special = ("hf_device_map", "_hf_hook", "is_quantized", "peft_config", "_compiled_call_impl")
        if (
            not isinstance(model, DetrForDetection)
            or isinstance(model, PreparedDetr)
            or any(getattr(model, name, None) for name in special)
            or any(_is_observed(module) for module in model.modules())
        ):
            return model
        state: tuple[Any, ...] = tuple(
            (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
            for tensors in (model.parameters(), model.buffers())
            for tensor in tensors
        )
        state += (model.config._attn_implementation,)
        if state != self._prepared_of:
            self._prepared = None  # its memory is for the next one
            self._prepared, self._prepared_of = prepare_for_inference(model), state
        return self._prepared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; several images may also be a tuple or a column of a dataset."""
        several = (tuple, datasets.Column)
        args = tuple(list(given) if isinstance(given, several) else given for given in args)
        kwargs = {name: list(given) if isinstance(given, several) else given for name, given in kwargs.items()}
        return super().__call__(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Workers that read images get the pipeline, but do not predict."""
        return self.__dict__ | {"_prepared": None, "_prepared_of": ()}

    def check_model_type(self, supported_models: Any) -> None:
        """Our models are supported; transformers has a list of its own class names only."""

    def preprocess(self, image: Any, timeout: float | None = None) -> dict[str, Any]:
        pixels = self.image_processor.to_tensor(image, timeout)
        inputs = self.image_processor(pixels, do_pad=False, input_data_format="channels_first", return_tensors="pt")
        return {"pixel_values": [inputs["pixel_values"][0]], "target_size": [tuple(pixels.shape[-2:])]}

    def _predict(
        self, model_inputs: dict[str, Any], masks_above: float | None = None
    ) -> tuple[Any, list[tuple[int, int]]]:
        """The model's outputs for a batch, and the (height, width) of its images before any resizing. `masks_above` is
        for models that choose which masks to compute; exports compute all."""
        images, target_sizes = (_flatten(model_inputs[key]) for key in ("pixel_values", "target_size"))
        predictor = self._predictor()
        sizes = [(image.shape[1], image.shape[2]) for image in images]
        # the mask stays on the host: the backbone reads the sizes from it without waiting for the device
        pixel_values, pixel_mask = allocate_batch(sizes, images[0].shape[0], dtype=predictor.dtype)
        pixel_values = pixel_values.to(images[0].device)
        for image, values, (height, width) in zip(images, pixel_values, sizes, strict=True):
            values[:, :height, :width] = image
        is_padded = len(set(sizes)) > 1
        chosen = {"masks_above": masks_above} if isinstance(predictor, DetrForSegmentation) else {}
        outputs = predictor(pixel_values=pixel_values, pixel_mask=pixel_mask if is_padded else None, **chosen)
        return outputs, target_sizes


class DetrDetectionPipeline(_DetrPipeline, ObjectDetectionPipeline):
    """transformers' pipeline with the same interface and these differences: any images and batches (see
    `_DetrPipeline`); boxes are clipped to the image; `threshold="per_class"` uses the thresholds saved with the
    processor; `round_boxes=False` returns box corners as predicted. transformers truncates them to whole pixels, which
    lowers COCO metrics computed from them, those of small objects most.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.model, DetrModel):
            raise ValueError(
                "DetrModel has no class head and detects nothing. Load the checkpoint with DetrForDetection, or use "
                'the pipeline "image-feature-extraction".'
            )

    def _sanitize_parameters(self, round_boxes: bool | None = None, **kwargs: Any) -> tuple[dict[str, Any], ...]:
        refuse_unknown("The pipeline", kwargs, ("threshold", "timeout", "round_boxes"))
        preprocess, forward, postprocess = super()._sanitize_parameters(**kwargs)
        return preprocess, forward, postprocess | ({} if round_boxes is None else {"round_boxes": round_boxes})

    def _forward(self, model_inputs: dict[str, Any]) -> ModelOutput:
        outputs, target_sizes = self._predict(model_inputs, masks_above=1.0)  # none
        return ModelOutput(target_size=torch.tensor(target_sizes), **to_host(outputs))

    def postprocess(
        self, model_outputs: ModelOutput, threshold: float | str = 0.5, round_boxes: bool = True
    ) -> list[dict[str, Any]]:
        sizes = model_outputs["target_size"]
        [result] = self.image_processor.post_process_object_detection(model_outputs, threshold, sizes)
        boxes = (result["boxes"].int() if round_boxes else result["boxes"]).tolist()
        names = [self.model.config.id2label[label] for label in result["labels"].tolist()]
        return [
            {"score": score, "label": name, "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))}
            for score, name, box in zip(result["scores"].tolist(), names, boxes, strict=True)
        ]


class DetrSegmentationPipeline(_DetrPipeline, ImageSegmentationPipeline):
    """transformers' pipeline with the same interface and these differences: any images and batches (see
    `_DetrPipeline`); `rule` is an argument, as of `post_process_panoptic_segmentation`; `threshold` is by default 0.5,
    and for the paper's rule of panoptic segmentation the processor's `panoptic_threshold`, or 0.85; classes in
    `config.stuff_labels` are fused.

    Masks are computed for queries above the threshold only, except for semantic segmentation, which needs all, and by
    exports.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not getattr(self.model, "has_masks", False):
            raise ValueError(
                f"{type(self.model).__name__} has no masks. Load the checkpoint with DetrForSegmentation and train its "
                'mask head, or use the pipeline "object-detection".'
            )

    def _sanitize_parameters(self, **kwargs: Any) -> tuple[dict[str, Any], ...]:
        of_masks = ("subtask", "threshold", "mask_threshold", "overlap_mask_area_threshold", "rule")
        refuse_unknown("The pipeline", kwargs, (*of_masks, "timeout"))
        subtask = kwargs.get("subtask")
        if subtask not in (None, "panoptic", "instance", "semantic"):
            raise ValueError(f'subtask must be "panoptic", "instance" or "semantic", got {subtask!r}.')
        forward = {name: kwargs[name] for name in of_masks if kwargs.get(name) is not None}
        return {name: kwargs[name] for name in ("timeout",) if name in kwargs}, forward, {}

    def _forward(self, model_inputs: dict[str, Any], subtask: str = "panoptic", **kwargs: Any) -> ModelOutput:
        # here and not in `_sanitize_parameters`, since the arguments of the pipeline and of the call are together now
        processor, segments = self.image_processor, []
        if subtask == "semantic":
            if kwargs:
                raise ValueError(
                    f'subtask="semantic" gives each pixel its best class; {sorted(kwargs)} would have no effect.'
                )
            outputs, target_sizes = self._predict(model_inputs)
            for classes in processor.post_process_semantic_segmentation(outputs, target_sizes):
                found = [{"id": label, "label_id": label, "score": None} for label in classes.unique().tolist()]
                segments.append({"segmentation": classes, "segments_info": found})
            return ModelOutput(segments=segments)
        if subtask == "panoptic":
            kwargs = {"rule": "paper", "label_ids_to_fuse": self.model.config.stuff_label_ids} | kwargs
            unused = [name for name in ("mask_threshold", "overlap_mask_area_threshold") if name in kwargs]
            if kwargs["rule"] == "paper" and unused:
                raise ValueError(f'{unused} are of transformers\' rule: add rule="transformers".')
        elif kwargs.pop("rule", "transformers") != "transformers":
            raise ValueError('rule is for subtask="panoptic"; instances are separated by transformers\' rule.')
        if kwargs.get("threshold") is None:
            kwargs["threshold"] = default_threshold(kwargs.get("rule", "transformers"), processor.panoptic_threshold)
        outputs, target_sizes = self._predict(model_inputs, masks_above=kwargs["threshold"])
        post_process = getattr(processor, f"post_process_{subtask}_segmentation")
        return ModelOutput(segments=post_process(outputs, target_sizes=target_sizes, **kwargs))

    def postprocess(self, model_outputs: ModelOutput) -> list[dict[str, Any]]:
        [result] = _flatten_one(model_outputs["segments"])
        names = self.model.config.id2label
        return [
            {
                "score": segment["score"],
                "label": names[segment["label_id"]],
                "mask": Image.fromarray((result["segmentation"] == segment["id"]).numpy().astype("uint8") * 255),
            }
            for segment in result["segments_info"]
        ]


def _is_observed(module: torch.nn.Module) -> bool:
    """Whether the module has hooks, or a `forward` of its own, which a copy would not run."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def _flatten(entries: list[Any]) -> list[Any]:
    """The pipeline's loader gives [x] for a batch of one and [[x], [x], ...] for larger ones."""
    return [entry[0] if isinstance(entry, list) else entry for entry in entries]


def _flatten_one(entry: Any) -> list[Any]:
    """The pipeline's loader takes batches of more than one apart."""
    return entry if isinstance(entry, list) else [entry]
