"""Checkpoints as others write them: by transformers, in both layouts, and with the names of the paper's own code."""

import json
import re
from pathlib import Path

import torch
import transformers
from conftest import TINY, randomise_norms
from safetensors.torch import load_file, save_file
from transformers import (
    ConditionalDetrForObjectDetection,
    DabDetrForObjectDetection,
    DetrForObjectDetection,
    DetrForSegmentation,
    TableTransformerForObjectDetection,
)

RESNET = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}
SMALL_RESNET = {"layer_type": "bottleneck", "depths": [1, 2, 1, 1], "hidden_sizes": [32, 64, 128, 256]}


KINDS = {
    "detr": DetrForObjectDetection,
    "table": TableTransformerForObjectDetection,
    "masks": DetrForSegmentation,
    "conditional": ConditionalDetrForObjectDetection,
    "dab": DabDetrForObjectDetection,
}


def their_model(
    backbone: str = "test_resnet", *, kind: str = "detr", resnet: dict | None = None, **fields
) -> transformers.PreTrainedModel:
    """transformers' DETR, with masks or not, Table Transformer, Conditional DETR or DAB-DETR, with random weights, on a
    timm backbone or on its own ResNet.

    The paper's own files can only hold a ResNet that the paper's code knows, e.g. "resnet18"; see `save_original`.
    """
    if kind == "masks":  # transformers' needs d_model + heads in multiples of 8
        fields = {"encoder_attention_heads": 8, "decoder_attention_heads": 8} | fields
    if resnet is not None:
        stages = [f"stage{stage}" for stage in range(1 if kind == "masks" else 4, 5)]
        own = transformers.ResNetConfig(**resnet, out_features=stages)
        fields |= {"backbone_config": own, "use_timm_backbone": False}
    else:
        fields["backbone"] = backbone
    fields = TINY | fields
    if kind == "dab":
        fields["hidden_size"] = fields.pop("d_model")
    model = KINDS[kind](KINDS[kind].config_class(**fields)).eval()
    randomise_norms(model)
    spread(model)
    return model


@torch.no_grad()
def spread(model: torch.nn.Module) -> None:
    """Initialize weights with the magnitude of trained ones. With transformers' initial weights (standard deviation
    0.02) attention is flat and all queries predict the same, which would hide most mistakes in reading a checkpoint.
    The same for the attention maps of a mask head, one softmax over all heads and locations, and what reads them."""
    for name, parameter in model.named_parameters():
        if "backbone." in name and "position_embedding" not in name:
            continue
        if any(part in name for part in ("query_position", "query_refpoint", "patterns", "row_emb", "column_emb")):
            parameter.normal_()
        elif name.endswith("activation_fn.weight"):  # of a PReLU
            parameter.uniform_(0, 0.5)
        elif parameter.ndim > 1:
            torch.nn.init.xavier_uniform_(parameter)
            if "bbox_attention" in name:
                parameter.mul_(2)
            elif name == "mask_head.conv1.conv.weight":
                parameter[:, TINY["d_model"] :].mul_(20)
        elif "norm" not in name:
            parameter.normal_(0, 0.1)
    calibrate(model)


def calibrate(model: torch.nn.Module) -> None:
    """Scale what a mask head reads from a random backbone to values around 1; they may be 10^5 times as large, and
    attention maps would be lost beside them."""

    def divide(layer: torch.nn.Conv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        for parameter in layer.parameters():
            parameter.div_(output.std())
        return output / output.std()

    parts = [module for name, module in model.named_modules() if name.endswith(("input_projection", "fpn_adapter"))]
    if len(parts) > 1:
        hooks = [part.register_forward_hook(divide) for part in parts]
        model(torch.randn(1, 3, 64, 96))
        for hook in hooks:
            hook.remove()


def save_v5(model: transformers.PreTrainedModel, folder: Path, **kwargs) -> Path:
    """The names transformers 5 has in memory."""
    model.save_pretrained(folder, save_original_format=False, **kwargs)
    return folder


def save_v4(model: transformers.PreTrainedModel, folder: Path, *, pickle: bool | str = False, **kwargs) -> Path:
    """As transformers 4.57 wrote it, which was compared with files of that version: its weight names, and a config that
    names the backbone in `backbone` and `use_timm_backbone`."""
    model.save_pretrained(folder, **kwargs)
    config = json.loads((folder / "config.json").read_text())
    nested = config["backbone_config"]
    if nested["model_type"] == "timm_backbone":
        kwargs = {"in_chans": 3, "out_indices": [1, 2, 3, 4]} | ({"output_stride": 16} if config["dilation"] else {})
        config |= {"backbone": nested["backbone"], "backbone_config": None, "backbone_kwargs": kwargs}
    else:
        config |= {"backbone": None, "backbone_kwargs": None}
    config |= {"use_timm_backbone": nested["model_type"] == "timm_backbone", "use_pretrained_backbone": False}
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    if file.exists():
        renamed = {
            name.replace("model.position_embedding.", "model.backbone.position_embedding."): tensor
            for name, tensor in load_file(file).items()
        }
        file.unlink()
        if pickle == "sharded":
            names = sorted(renamed)
            files = {n: f"pytorch_model-{1 + i % 3:05}-of-00003.bin" for i, n in enumerate(names)}
            for shard in set(files.values()):
                torch.save({n: renamed[n] for n in names if files[n] == shard}, folder / shard)
            index = {"metadata": {"total_size": 0}, "weight_map": files}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        elif pickle:
            torch.save(renamed, folder / "pytorch_model.bin")
        else:
            save_file(renamed, file, metadata={"format": "pt"})
    return folder


def save_original(model: transformers.PreTrainedModel, file: Path, **content) -> Path:
    """The weights of a transformers' model under the names of the papers' code (facebookresearch/detr,
    Atten4Vis/ConditionalDETR, IDEA-Research/DAB-DETR), written out here by hand."""
    naming = {"conditional_detr": _names_of_conditional, "dab-detr": _names_of_dab}.get(model.config.model_type)
    if naming is None:
        return _save_detr(model, file, **content)
    theirs = dict(model.state_dict())
    names = naming(model.config)
    backbone = re.compile(r"model\.backbone\.(conv_encoder\.)?model\.(_backbone\.)?")
    names |= {backbone.sub("backbone.0.body.", name): name for name in theirs if backbone.match(name)}
    state = {new: theirs.pop(old) for new, old in names.items() if old in theirs}
    for name in [name for name in theirs if ".bbox_embed." in name]:  # shared
        del theirs[name]
    assert not theirs, sorted(theirs)
    for name in [name for name in state if name.startswith("bbox_embed.") and model.config.model_type == "dab-detr"]:
        state[f"transformer.decoder.{name}"] = state[name]
    for layer in range(model.config.encoder_layers):
        attention = f"transformer.encoder.layers.{layer}.self_attn"
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{attention}.{p}.{kind}") for p in "qkv"]
            state[f"{attention}.in_proj_{kind}"] = torch.cat(parts)
    torch.save({"model": state, **content}, file)
    return file


def _both(new: str, old: str) -> dict[str, str]:
    return {f"{new}.{kind}": f"{old}.{kind}" for kind in ("weight", "bias")}


def _heads() -> dict[str, str]:
    names = _both("input_proj", "model.input_projection")
    for layer in range(3):
        names |= _both(f"bbox_embed.layers.{layer}", f"bbox_predictor.layers.{layer}")
    return names


def _names_of_conditional(config: transformers.PreTrainedConfig) -> dict[str, str]:
    names = _heads() | _both("class_embed", "class_labels_classifier")
    names |= {"query_embed.weight": "model.query_position_embeddings.weight"}
    names |= _both("transformer.decoder.norm", "model.decoder.layernorm")
    for mlp in ("query_scale", "ref_point_head"):
        for layer in range(2):
            names |= _both(f"transformer.decoder.{mlp}.layers.{layer}", f"model.decoder.{mlp}.layers.{layer}")
    for layer in range(config.encoder_layers):
        old, new = f"model.encoder.layers.{layer}", f"transformer.encoder.layers.{layer}"
        for part in "qkv":
            names |= _both(f"{new}.self_attn.{part}", f"{old}.self_attn.{part}_proj")
        names |= _both(f"{new}.self_attn.out_proj", f"{old}.self_attn.o_proj")
        names |= _both(f"{new}.linear1", f"{old}.mlp.fc1") | _both(f"{new}.linear2", f"{old}.mlp.fc2")
        names |= _both(f"{new}.norm1", f"{old}.self_attn_layer_norm") | _both(f"{new}.norm2", f"{old}.final_layer_norm")
    for layer in range(config.decoder_layers):
        old, new = f"model.decoder.layers.{layer}", f"transformer.decoder.layers.{layer}"
        for theirs, ours in (
            ("sa_qcontent_proj", "self_attn.q_content_proj"), ("sa_qpos_proj", "self_attn.q_pos_proj"),
            ("sa_kcontent_proj", "self_attn.k_content_proj"), ("sa_kpos_proj", "self_attn.k_pos_proj"),
            ("sa_v_proj", "self_attn.v_proj"), ("self_attn.out_proj", "self_attn.o_proj"),
            ("ca_qcontent_proj", "encoder_attn.q_content_proj"), ("ca_qpos_proj", "encoder_attn.q_pos_proj"),
            ("ca_kcontent_proj", "encoder_attn.k_content_proj"), ("ca_kpos_proj", "encoder_attn.k_pos_proj"),
            ("ca_v_proj", "encoder_attn.v_proj"), ("ca_qpos_sine_proj", "encoder_attn.q_pos_sine_proj"),
            ("cross_attn.out_proj", "encoder_attn.o_proj"), ("linear1", "mlp.fc1"), ("linear2", "mlp.fc2"),
            ("norm1", "self_attn_layer_norm"), ("norm2", "encoder_attn_layer_norm"), ("norm3", "final_layer_norm"),
        ):  # fmt: skip
            names |= _both(f"{new}.{theirs}", f"{old}.{ours}")
    return names


def _names_of_dab(config: transformers.PreTrainedConfig) -> dict[str, str]:
    names = _heads() | _both("class_embed", "class_embed")
    names |= {"refpoint_embed.weight": "model.query_refpoint_embeddings.weight"}
    names |= {"transformer.patterns.weight": "model.patterns.weight"}
    names |= _both("transformer.decoder.norm", "model.decoder.layernorm")
    for mlp in ("encoder.query_scale", "decoder.query_scale", "decoder.ref_point_head", "decoder.ref_anchor_head"):
        for layer in range(2):
            names |= _both(f"transformer.{mlp}.layers.{layer}", f"model.{mlp}.layers.{layer}")
    for layer in range(config.encoder_layers):
        old, new = f"model.encoder.layers.{layer}", f"transformer.encoder.layers.{layer}"
        for part in "qkv":
            names |= _both(f"{new}.self_attn.{part}", f"{old}.self_attn.{part}_proj")
        names |= _both(f"{new}.self_attn.out_proj", f"{old}.self_attn.out_proj")
        names |= _both(f"{new}.linear1", f"{old}.fc1") | _both(f"{new}.linear2", f"{old}.fc2")
        names |= _both(f"{new}.norm1", f"{old}.self_attn_layer_norm") | _both(f"{new}.norm2", f"{old}.final_layer_norm")
        names |= {f"{new}.activation.weight": f"{old}.activation_fn.weight"}
    for layer in range(config.decoder_layers):
        old, new = f"model.decoder.layers.{layer}", f"transformer.decoder.layers.{layer}"
        for short, long in (("sa", "self_attn.self_attn"), ("ca", "cross_attn.cross_attn")):
            for theirs, ours in (
                ("qcontent", "query_content"), ("qpos", "query_pos"), ("kcontent", "key_content"),
                ("kpos", "key_pos"), ("v", "value"), ("qpos_sine", "query_pos_sine"),
            ):  # fmt: skip
                names |= _both(f"{new}.{short}_{theirs}_proj", f"{old}.{long}_{ours}_proj")
            of_attention = long.split(".")[1]
            names |= _both(f"{new}.{of_attention}.out_proj", f"{old}.{long}.output_proj")
        names |= _both(f"{new}.norm1", f"{old}.self_attn.self_attn_layer_norm")
        names |= _both(f"{new}.norm2", f"{old}.cross_attn.cross_attn_layer_norm")
        names |= _both(f"{new}.norm3", f"{old}.mlp.final_layer_norm")
        names |= _both(f"{new}.linear1", f"{old}.mlp.fc1") | _both(f"{new}.linear2", f"{old}.mlp.fc2")
        names |= {f"{new}.activation.weight": f"{old}.mlp.activation_fn.weight"}
    return names


def _save_detr(model: transformers.PreTrainedModel, file: Path, **content) -> Path:
    theirs = {name.removeprefix("detr."): tensor for name, tensor in model.state_dict().items()}
    has_masks = "mask_head.output_conv.weight" in theirs
    state: dict[str, torch.Tensor] = {}

    def put(new: str, old: str) -> None:
        for kind in ("weight", "bias"):
            if f"{old}.{kind}" in theirs:
                state[f"{new}.{kind}"] = theirs.pop(f"{old}.{kind}")

    def put_attention(new: str, old: str) -> None:
        for kind in ("weight", "bias"):
            state[f"{new}.in_proj_{kind}"] = torch.cat([theirs.pop(f"{old}.{p}_proj.{kind}") for p in "qkv"])
        put(f"{new}.out_proj", f"{old}.o_proj")

    for layer in range(model.config.encoder_layers):
        old, new = f"model.encoder.layers.{layer}", f"transformer.encoder.layers.{layer}"
        put_attention(f"{new}.self_attn", f"{old}.self_attn")
        put(f"{new}.linear1", f"{old}.mlp.fc1")
        put(f"{new}.linear2", f"{old}.mlp.fc2")
        put(f"{new}.norm1", f"{old}.self_attn_layer_norm")
        put(f"{new}.norm2", f"{old}.final_layer_norm")
    for layer in range(model.config.decoder_layers):
        old, new = f"model.decoder.layers.{layer}", f"transformer.decoder.layers.{layer}"
        put_attention(f"{new}.self_attn", f"{old}.self_attn")
        put_attention(f"{new}.multihead_attn", f"{old}.encoder_attn")
        put(f"{new}.linear1", f"{old}.mlp.fc1")
        put(f"{new}.linear2", f"{old}.mlp.fc2")
        put(f"{new}.norm1", f"{old}.self_attn_layer_norm")
        put(f"{new}.norm2", f"{old}.encoder_attn_layer_norm")
        put(f"{new}.norm3", f"{old}.final_layer_norm")
    put("transformer.decoder.norm", "model.decoder.layernorm")
    put("query_embed", "model.query_position_embeddings")
    put("input_proj", "model.input_projection")
    put("class_embed", "class_labels_classifier")
    for layer in range(3):
        put(f"bbox_embed.layers.{layer}", f"bbox_predictor.layers.{layer}")
    put("backbone.1.row_embed", "model.position_embedding.row_embeddings")
    put("backbone.1.col_embed", "model.position_embedding.column_embeddings")
    for name in [name for name in theirs if name.startswith("model.backbone.model.")]:
        state[name.replace("model.backbone.model.", "backbone.0.body.")] = theirs.pop(name)
    if has_masks:
        state = {f"detr.{name}": tensor for name, tensor in state.items()}
        for kind in "qk":
            put(f"bbox_attention.{kind}_linear", f"bbox_attention.{kind}_proj")
        for index in range(5):
            block = f"conv{index + 1}" if index < 2 else f"fpn_stages.{index - 2}.refine"
            put(f"mask_head.lay{index + 1}", f"mask_head.{block}.conv")
            put(f"mask_head.gn{index + 1}", f"mask_head.{block}.norm")
        for index in range(3):
            put(f"mask_head.adapter{index + 1}", f"mask_head.fpn_stages.{index}.fpn_adapter")
        put("mask_head.out_lay", "mask_head.output_conv")
    assert not theirs, sorted(theirs)
    torch.save({"model": state, **content}, file)
    return file
