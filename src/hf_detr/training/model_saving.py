"""Saving a model with its processor and metrics."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..hub import hash_of_weights
from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from .checkpoints import replace_files
from .lora import merge_lora


def save_model(
    model: DetrForDetection, processor: DetrImageProcessor, metrics: Mapping[str, Any], target: Path, partial: Path
) -> None:
    """Write model, processor and `metrics.json` into the folder `target`, each file atomically. LoRA adapters are
    merged.

    Args:
        metrics: of these weights; their hash is added as `weights`.
        partial: folder on the same disk for files that are not complete yet.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model = merge_lora(model) if hasattr(model, "peft_config") else model
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        content = {**metrics, "weights": hash_of_weights(partial)}
        (partial / "metrics.json").write_text(json.dumps(content, indent=2))
        replace_files(partial, target)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"The weights cannot be saved in {target}: {error}. Free some space; the same command continues from the "
            "last checkpoint."
        ) from error
