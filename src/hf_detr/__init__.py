"""hf_detr: DETR as a Hugging Face model package. The journey of an image, file by file:

    step 1  images                     any image -> RGB
            image_processing_hf_detr   images + annotations -> pixel_values, pixel_mask, labels
    step 2  backbone                   timm features -> feature_map and its mask
    step 3  position_embedding         where each cell of the feature map lies
    step 4  transformer                encoder and decoder
            anchors                    the other decoder, whose queries are boxes
    step 5  heads                      class logits and boxes
    step 6  matcher                    which query answers for which object
    step 7  loss                       the set loss
            class_loss                 its class term, and that of the matching
            denoising                  further queries that restore spoilt objects, in training
            dense_supervision          a loss on every cell of the feature map, in training
    step 8  post_processing            boxes in pixels

`initialization` has the weights to start from, `modeling_hf_detr` wires steps 2 to 7, `pipeline_hf_detr` all of them
for prediction. Importing this package registers the classes with transformers' Auto classes and
`pipeline("object-detection")`.
"""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForObjectDetection, ObjectDetectionPipeline
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY, _resolve_impl

from .hub import register_model_card
from .interop import register_readers
from .model.configuration_hf_detr import DetrConfig
from .model.image_processing_hf_detr import DetrImageProcessor
from .model.modeling_hf_detr import DetrForDetection, DetrModel
from .model.outputs import DetrDetectionOutput, DetrModelOutput
from .prediction.pipeline import DetrDetectionPipeline

DetrForObjectDetection = DetrForDetection  # transformers' name

__version__ = "0.1.0"

__all__ = [
    "DetrConfig",
    "DetrDetectionOutput",
    "DetrDetectionPipeline",
    "DetrForDetection",
    "DetrForObjectDetection",
    "DetrImageProcessor",
    "DetrModel",
    "DetrModelOutput",
]

# transformers keys these by class, but refuses a config class that shares its *name* with one of its own (`DetrConfig`)
# unless told that this is meant; its own DetrConfig keeps its entries.
AutoConfig.register(DetrConfig.model_type, DetrConfig)
AutoModel.register(DetrConfig, DetrModel, exist_ok=True)
AutoModelForObjectDetection.register(DetrConfig, DetrForDetection, exist_ok=True)
IMAGE_PROCESSOR_MAPPING.register(DetrConfig, {"torchvision": DetrImageProcessor}, exist_ok=True)

# The code travels with what is saved, so that it loads with trust_remote_code where this package is not installed.
DetrConfig.register_for_auto_class()
DetrModel.register_for_auto_class("AutoModel")
DetrForDetection.register_for_auto_class("AutoModelForObjectDetection")
DetrImageProcessor.register_for_auto_class("AutoImageProcessor")

register_model_card()  # model.push_to_hub
register_readers()  # DetrForDetection.from_pretrained("facebook/detr-resnet-50")

_task = PIPELINE_REGISTRY.supported_tasks["object-detection"]
_impl_of_others = _task["impl"]  # a class, or the dotted path of one that transformers imports when it is needed


class _ObjectDetection(ObjectDetectionPipeline):
    """What `pipeline("object-detection")` calls: ours for our models, for all others the class it was before."""

    # Looking for one, transformers would take our image processor's auto_map for it and ask whether to run its code.
    _load_video_processor = False

    def __new__(cls, *args: Any, model: Any, **kwargs: Any) -> Any:
        if model.config.model_type == DetrConfig.model_type:
            return DetrDetectionPipeline(*args, model=model, **kwargs)
        return _resolve_impl(_impl_of_others)(*args, model=model, **kwargs)


_task["impl"] = _ObjectDetection
