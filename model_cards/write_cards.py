"""Write the model cards in this folder.

    python model_cards/write_cards.py        # of the converted published checkpoints
    python model_cards/write_cards.py RUN    # and of detr-shapes; RUN is an output folder of examples/finetune.py

The results of the published checkpoints are the paper's (arXiv 2005.12872, table 1); they were not measured again.
"""

import sys
from pathlib import Path

import torch
from PIL import Image

from hf_detr import DetrConfig, DetrForDetection, DetrImageProcessor
from hf_detr.hub import build_model_card, model_card_of
from hf_detr.interop import coco_labels

HERE = Path(__file__).parent
COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
PUBLISHED = {
    "detr-resnet-50": (("resnet50", False), (0.420, 0.624, 0.442, 0.205, 0.458, 0.611)),
    "detr-resnet-50-dc5": (("resnet50", True), (0.433, 0.631, 0.459, 0.225, 0.473, 0.611)),
    "detr-resnet-101": (("resnet101", False), (0.435, 0.638, 0.464, 0.219, 0.480, 0.618)),
    "detr-resnet-101-dc5": (("resnet101", True), (0.449, 0.647, 0.477, 0.237, 0.495, 0.623)),
}
SOURCE = (
    "From table 1 of the paper, on the COCO 2017 validation set. They were not measured again with this conversion, "
    "which changes the names of the weights and none of their values."
)


def main() -> None:
    labels = coco_labels()
    for name, ((backbone, dilation), results) in PUBLISHED.items():
        config = DetrConfig(backbone=backbone, dilation=dilation, id2label=labels)
        with torch.device("meta"):
            model = DetrForDetection(config)
        card = build_model_card(
            model,
            f"USER/{name}",
            processor=DetrImageProcessor(),
            metrics=dict(zip(COLUMNS, results, strict=True)),
            source=SOURCE,
            base_model=f"facebook/{name}",
            datasets=["coco"],
            license="apache-2.0",
            training=f"By the paper's authors, 500 epochs on COCO 2017. The weights are those of `facebook/{name}`.",
        )
        (HERE / name).mkdir(exist_ok=True)
        card.save(HERE / name / "README.md")
    if len(sys.argv) > 1:
        run, target = Path(sys.argv[1]), HERE / "detr-shapes"
        target.mkdir(exist_ok=True)
        model_card_of(run, "USER/detr-shapes", license="apache-2.0").save(target / "README.md")
        with Image.open(run / "validation.png") as picture:  # reduced, to keep the git repository small
            picture.resize((640, 640)).quantize(128).save(target / "validation.png", optimize=True)


if __name__ == "__main__":
    main()
