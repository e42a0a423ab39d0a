"""A class that is rare in the training images: what class weights and repeated images do for it.

    python benchmarks/rare_class.py FOLDER
    python examples/finetune.py --dataset FOLDER ... [--repeat_threshold 0.2] [--set 'class_weights={"triangle": 5}']

Draws the shapes of the embedded data set, with one triangle for about 50 other objects in the training images. In the
validation images all classes are equally frequent, so that `AP_triangle` is measured on many objects.
"""

import sys
from pathlib import Path

import numpy as np

from hf_detr.data import shapes
from hf_detr.data.shapes import Drawing, draw_shapes_image, write_drawn_dataset

RARE, ONE_IN = "triangle", 50


def draw_rare_class_dataset(folder: str | Path, *, num_train: int = 1000, num_val: int = 300, seed: int = 0) -> Path:
    """Like `draw_shapes_dataset`; an image with a triangle is kept with the probability that makes triangles rare."""
    kept = 0.03  # of images per triangle
    training = iter(range(num_train))

    def draw(rng: np.random.Generator) -> Drawing:
        is_training = next(training, None) is not None
        while True:
            image, objects = draw_shapes_image(rng)
            number = sum(shapes.CLASSES[class_id] == RARE for class_id, _ in objects)
            if not is_training or rng.random() < kept**number:
                return image, objects

    return write_drawn_dataset(
        folder, draw, shapes.CLASSES, f"hf_detr shapes, {RARE} 1:{ONE_IN}", num_train=num_train, num_val=num_val,
        seed=seed, progress=False,
    )  # fmt: skip


if __name__ == "__main__":
    draw_rare_class_dataset(sys.argv[1])
