"""The paper's DETR (arXiv 2005.12872), written out: loads a checkpoint of hf_detr and detects objects in one image.

python examples/detr_in_50_lines.py CHECKPOINT image.jpg
"""

import argparse
import math
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch.nn.functional import conv2d, layer_norm, linear

from hf_detr import DetrConfig, DetrImageProcessor

PAPER = {
    "query_type": "learned",
    "class_activation": "softmax",
    "norm_between_layers": False,
    "position_temperature": None,
    "position_embedding_type": "sine",
    "pre_norm": False,
    "dilation": False,
    "feature_stride": None,
    "activation_function": "relu",
    "backbone_kwargs": None,
    "num_channels": 3,
}


class Detr:
    def __init__(self, folder):
        self.c = DetrConfig.from_pretrained(folder)
        self.w = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
        if other := [name for name, value in PAPER.items() if getattr(self.c, name) != value]:
            sys.exit(f"This is the paper's model only; {folder} differs in {', '.join(other)}. Use predict.py.")
        self.backbone = timm.create_model(self.c.backbone, features_only=True, out_indices=(-1,)).eval()
        own = {k.removeprefix("model.backbone.model."): v for k, v in self.w.items() if ".backbone." in k}
        missing, _ = self.backbone.load_state_dict(own, strict=False)
        assert all("num_batches_tracked" in name for name in missing)  # frozen batch norms have none

    def linear(self, name, x):
        return linear(x, self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def norm(self, name, x):
        return layer_norm(x, x.shape[-1:], self.w[f"{name}.weight"], self.w[f"{name}.bias"])

    def attention(self, name, heads, *query_key_value):  # each head weights values by how queries match keys
        projected = [self.linear(f"{name}.{p}_proj", x) for p, x in zip("qkv", query_key_value, strict=True)]
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in projected)
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)  # (B, heads, queries, keys)
        return self.linear(f"{name}.o_proj", (weights @ v).transpose(1, 2).flatten(2))

    def layer(self, name, heads, x, positions, memory=None, keys=None):  # positions are never added to values
        attended = self.attention(f"{name}.self_attn", heads, x + positions, x + positions, x)
        x = self.norm(f"{name}.self_attn_layer_norm", x + attended)
        if memory is not None:  # the decoder's layers also attend from the queries to the image
            attended = self.attention(f"{name}.encoder_attn", heads, x + positions, keys, memory)
            x = self.norm(f"{name}.encoder_attn_layer_norm", x + attended)
        hidden = self.linear(f"{name}.mlp.fc1", x).relu()
        return self.norm(f"{name}.final_layer_norm", x + self.linear(f"{name}.mlp.fc2", hidden))

    def sines(self, length):  # of rows or columns: (length, d / 2)
        p, n = torch.arange(1, length + 1)[:, None] / (length + 1e-6) * 2 * math.pi, self.c.d_model // 2
        angle = p / 10000 ** (2 * torch.arange(n // 2) / n)
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)

    def __call__(self, pixel_values):  # (B, 3, H, W) to logits (B, Q, classes + 1), the last is "no object", and boxes
        projection = (self.w[f"model.input_projection.{name}"] for name in ("weight", "bias"))
        memory = conv2d(self.backbone(pixel_values)[-1], *projection)  # (B, d, h, w)
        rows, columns = (self.sines(length) for length in memory.shape[-2:])
        rows, columns = rows[:, None].expand(-1, len(columns), -1), columns.expand(len(rows), -1, -1)
        positions, memory = torch.cat((rows, columns), dim=-1).flatten(0, 1), memory.flatten(2).mT  # (B, hw, d)
        for i in range(self.c.encoder_layers):
            memory = self.layer(f"model.encoder.layers.{i}", self.c.encoder_attention_heads, memory, positions)
        queries = self.w["model.query_position_embeddings.weight"]
        x, heads = torch.zeros_like(queries).expand(len(memory), -1, -1), self.c.decoder_attention_heads
        for i in range(self.c.decoder_layers):
            x = self.layer(f"model.decoder.layers.{i}", heads, x, queries, memory, memory + positions)
        x = self.norm("model.decoder.layernorm", x)
        logits, head = self.linear("class_labels_classifier", x), "model.decoder.bbox_predictor.layers"
        x = self.linear(f"{head}.1", self.linear(f"{head}.0", x).relu()).relu()
        return logits, self.linear(f"{head}.2", x).sigmoid()  # center x, center y, width, height in [0, 1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder")
    parser.add_argument("image", type=Path, help="a file")
    args = parser.parse_args()
    detr, processor = Detr(args.checkpoint), DetrImageProcessor.from_pretrained(args.checkpoint)
    with torch.no_grad():
        logits, boxes = detr(processor(images=args.image, return_tensors="pt")["pixel_values"])
    for scores, box in zip(logits[0].softmax(-1)[:, :-1], boxes[0], strict=True):
        if scores.max() > 0.5:
            print(detr.c.id2label[scores.argmax().item()], f"{scores.max():.2f}", box.tolist())
