"""Continue a checkpoint that transformers' class has trained: the AP before, which should be equal, and after it.

    python benchmarks/continued.py --model runs/shapes-1 --data data/shapes --work runs/continued

transformers' Conditional DETR and DAB-DETR, with random weights but for the backbone of `--model`, learn the drawn
shapes with their own loss. Their checkpoint is measured by transformers' model and processor and by ours; then
`finetune.py` continues it with the recipe that it chooses.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_detr import DetrForDetection, DetrImageProcessor
from hf_detr.data import DetectionCollator, build_loader, load_detection_dataset
from hf_detr.evaluation import evaluate_detection
from hf_detr.interop import OtherDetector
from hf_detr.interop.other_detectors import OtherImageProcessor

ROOT = Path(__file__).parents[1]
KINDS = {
    "conditional": (transformers.ConditionalDetrForObjectDetection, "d_model"),
    "dab": (transformers.DabDetrForObjectDetection, "hidden_size"),
}
SIZES = {
    "num_queries": 30, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256,
    "encoder_attention_heads": 8, "decoder_attention_heads": 8, "dropout": 0.0,
}  # fmt: skip


def build(kind: str, ours: DetrForDetection, *, auxiliary: bool) -> Any:
    """Their model with the trained backbone of ours."""
    network = {
        "model_type": "timm_backbone", "backbone": ours.config.backbone, "num_channels": 3, "features_only": True,
        "use_pretrained_backbone": False, "out_indices": list(ours.model.backbone._timm_kwargs["out_indices"]),
    }  # fmt: skip
    their_class, width = KINDS[kind]
    labels = {"id2label": ours.config.id2label, "label2id": ours.config.label2id, "auxiliary_loss": auxiliary}
    model = their_class(their_class.config_class(backbone_config=network, **{width: 128}, **labels, **SIZES))
    backbone = model.model.backbone
    backbone = getattr(backbone, "conv_encoder", backbone).model
    state = {n: t for n, t in ours.model.backbone.model.state_dict().items() if "num_batches" not in n}
    getattr(backbone, "_backbone", backbone).load_state_dict(state)
    return model


def train(model: Any, loader: Any, minutes: float) -> int:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=1e-4)
    began, steps = time.monotonic(), 0
    while True:
        for batch in loader:
            fraction = (time.monotonic() - began) / (60 * minutes)
            if fraction >= 1:
                return steps
            for group in optimizer.param_groups:
                group["lr"] = 4e-4 * min(1.0, 3 * (1 - fraction))
            mask = batch["pixel_mask"].long()
            model(pixel_values=batch["pixel_values"], pixel_mask=mask, labels=batch["labels"]).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="detector of the drawn shapes, for its backbone")
    parser.add_argument("--data", type=Path, required=True, help="the drawn shapes")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--kinds", nargs="+", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--minutes", type=float, default=4, help="of their training, and of ours after it")
    args = parser.parse_args()
    print(
        "| | auxiliary_loss | steps | AP, theirs | AP, ours | difference | after ours |\n|---|---|---|---|---|---|---|"
    )
    ours, processor = DetrForDetection.from_pretrained(args.model), DetrImageProcessor.from_pretrained(args.model)
    names = ours.config.id2label
    train_set, val_set = (load_detection_dataset(args.data, split, id2label=names) for split in ("train", "val"))
    loader = build_loader(train_set, DetectionCollator(processor), batch_size=16, seed=0, training=True)
    val_loader = build_loader(val_set, DetectionCollator(processor), batch_size=8, training=False)
    for kind in args.kinds:
        torch.manual_seed(0)
        auxiliary = True
        theirs = build(kind, ours, auxiliary=auxiliary).train()
        steps = train(theirs, loader, args.minutes)
        folder = args.work / kind
        theirs.eval().save_pretrained(folder)
        fields = {name: getattr(processor, name) for name in ("size", "do_resize", "image_mean", "image_std")}
        transformers.ConditionalDetrImageProcessor(**fields).save_pretrained(folder)
        other = OtherImageProcessor.of(transformers.ConditionalDetrImageProcessor.from_pretrained(folder))
        before = evaluate_detection(OtherDetector(theirs), val_loader, val_set, other).compute()["AP"]
        mine = DetrForDetection.from_pretrained(folder)
        after = evaluate_detection(mine, val_loader, val_set, processor).compute()["AP"]
        run = args.work / f"{kind}-continued"
        command = [sys.executable, str(ROOT / "examples" / "finetune.py"), "--model", str(folder), "--dataset"]
        command += [str(args.data), "--minutes", str(args.minutes), "--output_dir", str(run)]
        with (args.work / f"{kind}.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)
        end = json.loads((run / "metrics.json").read_text())["AP"]
        print(
            f"| {kind} | {auxiliary} | {steps} | {before:.4f} | {after:.4f} | {after - before:+.5f} | {end:.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
