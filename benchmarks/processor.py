"""Preprocessing a batch of 8 photos of mixed sizes, ours against transformers' `DetrImageProcessor`.

python benchmarks/processor.py
"""

import numpy as np
import torch
import transformers
from measure import compare, print_table
from PIL import Image

import hf_detr

SIZES = [(640, 480), (480, 640), (500, 375), (1024, 768), (1920, 1080), (333, 500), (640, 427), (1280, 960)]


def main() -> None:
    torch.set_num_threads(2)
    rng = np.random.default_rng(0)
    photos = [
        Image.fromarray(rng.integers(0, 256, (h // 8, w // 8, 3), dtype=np.uint8)).resize((w, h)) for w, h in SIZES
    ]
    annotations = [
        {
            "image_id": index,
            "annotations": [
                {"bbox": [w * x, h * x, w * 0.3, h * 0.3], "area": w * h * 0.09, "category_id": 1, "iscrowd": 0}
                for x in np.linspace(0, 0.6, 10).tolist()
            ],
        }
        for index, (w, h) in enumerate(SIZES)
    ]
    ours, theirs = hf_detr.DetrImageProcessor(), transformers.DetrImageProcessor()
    torch.testing.assert_close(
        ours(photos, return_tensors="pt")["pixel_values"],
        theirs(photos, return_tensors="pt")["pixel_values"],
        atol=1e-5,
        rtol=1e-5,
    )
    rows = {}
    for case, kwargs in (("images", {}), ("images and annotations", {"annotations": annotations})):
        rows[case] = compare(
            lambda kwargs=kwargs: ours(photos, return_tensors="pt", **kwargs),
            lambda kwargs=kwargs: theirs(photos, return_tensors="pt", **kwargs),
        )
    print_table("Image processor, 8 photos of mixed sizes to 800/1333, padded", rows)


if __name__ == "__main__":
    main()
