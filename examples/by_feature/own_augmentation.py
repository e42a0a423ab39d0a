"""`finetune.py` with an augmentation of your own, from torchvision v2 or Albumentations; all options are the same.

accelerate launch examples/by_feature/own_augmentation.py --dataset FOLDER
"""

import sys
from pathlib import Path

from torchvision.transforms import v2

from hf_detr.data import Augmentation
from hf_detr.runtime import exit_on_error

sys.path.insert(0, str(Path(__file__).parents[1]))
import finetune

# new: boxes, categories and areas follow the image; boxes that leave it are dropped
AUGMENTATION = Augmentation(
    v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(degrees=5, translate=(0.1, 0.1), scale=(0.8, 1.2)),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
        ]
    )
)

if __name__ == "__main__":
    with exit_on_error():
        finetune.main(augmentation=AUGMENTATION)
