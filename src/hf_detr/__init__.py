"""hf_detr: DETR as a Hugging Face model package. The way of an image through the package, file by file:

`model/`: everything that travels with a pushed checkpoint

    step 1  image_io                     any image -> RGB tensor
            annotations                  COCO records -> labels, and the check of their boxes
            mask_encoding                COCO polygons and run lengths <-> masks
            processor_size               the size of a resized image
            image_processing_hf_detr     images + annotations -> pixel_values, pixel_mask, labels
    step 2  timm_network                 a timm network: build, freeze, load
            backbone                     pixel_values -> feature maps and their masks
    step 3  position_embedding           the position of each location of the feature map
    step 4  attention                    multi-head attention
            encoder                      feature map -> memory
            queries                      the object queries of a batch; in training also noised boxes
            proposals                    queries that start at the most confident locations of the image
            decoder                      queries + memory -> hidden states and boxes: learned queries
            anchor_decoder               the same for queries that are boxes
            conditional_decoder          the same as in Conditional DETR
            dab_decoder                  the same as in DAB-DETR and DN-DETR
            decoders                     the decoders by name
    step 5  heads                        hidden states -> class logits and boxes
            mask_head                    attention maps and levels of the backbone -> a mask per query
            mask_encoding                polygons and run lengths -> masks, and back
            boxes                        IoU and GIoU
    step 6  matcher                      the matching of queries and objects
    step 7  class_loss, box_loss, mask_loss  the terms of the loss
            dense_supervision            an auxiliary loss on every location of the feature map
            loss                         the loss: matching, and the weighted terms
    step 8  post_processing              logits and boxes -> scores, labels and boxes in pixels
            mask_post_processing         logits and masks -> segments: panoptic, instance and semantic

    configuration_hf_detr                `DetrConfig`, all options with their meaning
    modeling_hf_detr                     `DetrModel` and `DetrForDetection`: steps 2 to 7
    segmentation                         `DetrForSegmentation`: the same with masks
    outputs                              what the models return
    initialization                       initial weights
    pretrained, resizing                 load and save; change classes or the number of queries
    foreign                              access to `interop` and `hub` where hf_detr is installed

The toolbox: everything else, a package per task

    data                                 read data sets of any format, augment, batch
    dataset_check                        find faults in a data set
    training                             recipes, schedules, checkpoints of a run
    speed                                prepare a model for fast prediction or training
    evaluation                           COCO metrics and error analysis
    prediction                           pipeline, image folders, tiles, videos; one predictor for any engine
    server                               a model behind HTTP
    visualization                        draw boxes, masks and attention; training curves; the parts of a model
    app                                  a page in the browser, and corrections to train on
    export                               ONNX and other runtimes
    interop                              read and write checkpoints of transformers and of the papers' code
    hub                                  push checkpoints with a model card
    runtime                              files, locks, signals
    commands, cli                        the scripts of examples/ as the command `hf-detr`

Importing hf_detr registers its classes with transformers' Auto classes, `pipeline("object-detection")` and
`pipeline("image-segmentation")`.
"""

from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageSegmentation,
    AutoModelForObjectDetection,
    ImageSegmentationPipeline,
    ObjectDetectionPipeline,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY, _resolve_impl

from .model.configuration_hf_detr import DetrConfig
from .model.image_processing_hf_detr import DetrImageProcessor
from .model.modeling_hf_detr import DetrForDetection, DetrModel
from .model.outputs import DetrDetectionOutput, DetrModelOutput, DetrSegmentationOutput
from .model.segmentation import DetrForSegmentation
from .prediction.pipeline import DetrDetectionPipeline, DetrSegmentationPipeline

__version__ = "0.1.0"

__all__ = [
    "DetrConfig",
    "DetrDetectionOutput",
    "DetrDetectionPipeline",
    "DetrForDetection",
    "DetrForObjectDetection",
    "DetrForSegmentation",
    "DetrImageProcessor",
    "DetrModel",
    "DetrModelOutput",
    "DetrSegmentationOutput",
    "DetrSegmentationPipeline",
]

DetrForObjectDetection = DetrForDetection  # its name in transformers


# -- Auto classes ----------------------------------------------------------------------------------------------------

# `exist_ok`: transformers has a DetrConfig, too, and otherwise raises for a config class of the same name. It looks
# models up by class, so its own entries stay.
AutoConfig.register(DetrConfig.model_type, DetrConfig)
AutoModel.register(DetrConfig, DetrModel, exist_ok=True)
AutoModelForObjectDetection.register(DetrConfig, DetrForDetection, exist_ok=True)
AutoModelForImageSegmentation.register(DetrConfig, DetrForSegmentation, exist_ok=True)
IMAGE_PROCESSOR_MAPPING.register(DetrConfig, {"torchvision": DetrImageProcessor}, exist_ok=True)

# Save the code with every checkpoint, which then loads with trust_remote_code where hf_detr is not installed.
DetrConfig.register_for_auto_class()
DetrModel.register_for_auto_class("AutoModel")
DetrForDetection.register_for_auto_class("AutoModelForObjectDetection")
DetrForSegmentation.register_for_auto_class("AutoModelForImageSegmentation")
DetrImageProcessor.register_for_auto_class("AutoImageProcessor")


# -- pipelines -------------------------------------------------------------------------------------------------------


def _register_pipeline(task: str, base: Any, ours: Any) -> None:
    """Put a class behind `pipeline(task)` that is ours for our models, and the previous one for all others."""
    entry = PIPELINE_REGISTRY.supported_tasks[task]
    previous = entry["impl"]  # a class, or the dotted path of one that is not imported yet

    class Chooser(base):
        # transformers would search for a video processor, mistake our image processor's auto_map for one, and ask
        # whether to trust its code.
        _load_video_processor = False

        def __new__(cls, *args: Any, model: Any, **kwargs: Any) -> Any:
            is_ours = model.config.model_type == DetrConfig.model_type
            return (ours if is_ours else _resolve_impl(previous))(*args, model=model, **kwargs)

    entry["impl"] = Chooser


_register_pipeline("object-detection", ObjectDetectionPipeline, DetrDetectionPipeline)
_register_pipeline("image-segmentation", ImageSegmentationPipeline, DetrSegmentationPipeline)
