"""LoRA: what trains and what holds still, and that nothing of PEFT is left in what is saved."""

import subprocess
import sys

import pytest
import torch
from conftest import padded_batch, random_labels, randomise_norms, relative_difference, tiny_model

from hf_detr import DetrForDetection
from hf_detr.training import parameter_groups
from hf_detr.training.lora import add_lora, merge_lora

pytestmark = pytest.mark.xdist_group("lora")  # its fixtures are expensive: one worker runs them once

pytest.importorskip("peft")
RANK = 4
KINDS = {
    "learned": {"query_type": "learned"},
    "learned and dense": {"query_type": "learned", "dense_loss_coefficient": 1},
    "anchor": {"query_type": "anchor"},
    "anchor, everything": {
        "query_type": "anchor", "denoising_groups": 2, "dense_loss_coefficient": 1,
        "modulate_attention": True, "class_loss": "iou_aware",
    },
    "batch norm that gathers": {"query_type": "anchor", "freeze_batch_norm": False, "frozen_stages": -1},
}  # fmt: skip


def trained_model(**changes):
    """As from a checkpoint: every weight is set, and so is every norm."""
    model = tiny_model(dropout=0.0, **changes)
    randomise_norms(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def batch():
    pixel_values, pixel_mask = padded_batch([(64, 96), (96, 64)])
    return {"pixel_values": pixel_values, "pixel_mask": pixel_mask, "labels": random_labels([3, 2])}


def train(model, steps=3):
    model.train()
    groups = [group for group in parameter_groups(model, 1e-2, 1e-2, 1e-2) if group["params"]]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch()).loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def predict(model):
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    outputs = model.eval()(**inputs)
    return outputs.logits, outputs.pred_boxes


@pytest.fixture(params=KINDS, scope="module")
def adapted(request):
    torch.manual_seed(0)
    model = trained_model(**KINDS[request.param])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    predicted = predict(model)
    model = add_lora(model, RANK)
    started = predict(model)
    return before, predicted, started, train(model)


def test_predictions_begin_as_they_were(adapted):
    _, predicted, started, _ = adapted
    for ours, theirs in zip(started, predicted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_what_is_frozen_holds_still_and_what_trains_moves(adapted):
    before, _, _, model = adapted
    now = {name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items()}
    heads = ("class_labels_classifier", "bbox_predictor", "query_position_embeddings", "dense_head", "denoising")
    for name, tensor in before.items():
        if name.endswith("num_batches_tracked"):
            continue
        in_full = any(head in name.split(".") for head in heads)
        assert torch.equal(now[name], tensor) != in_full, name
    updates = [name for name in now if ".lora_" in name]
    assert updates
    still = [name for name in updates if not now[name].any()]  # B starts at zero, and moves
    # but in the first attention among the queries, whose content is zero: without a gradient in any training of DETR
    assert all(name.startswith("model.decoder.layers.0.self_attn.") for name in still)
    assert bool(still) == (not model.config.denoising_groups)


def test_only_updates_and_heads_are_given_to_the_optimizer(adapted):
    *_, model = adapted
    groups = parameter_groups(model, 1e-4, 1e-5, 1e-4)
    assert {group["lr"] for group in groups} == {1e-4}, "there is no backbone among them"
    assert sum(len(group["params"]) for group in groups) == sum(p.requires_grad for p in model.parameters())
    config, layers = model.config, []
    width, encoder, decoder = config.d_model, config.encoder_ffn_dim, config.decoder_ffn_dim
    attention = 4 * RANK * (width + width)
    layers += config.encoder_layers * [attention + 2 * RANK * (width + encoder)]
    places = 2 * RANK * (width + width) if config.query_type == "anchor" else 0
    layers += config.decoder_layers * [2 * attention + places + 2 * RANK * (width + decoder)]
    projection = RANK * (model.model.backbone.channels[-1] + width)
    low_rank = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert low_rank == sum(layers) + projection


def test_merged_is_the_same_model_without_adapters_and_the_original_goes_on(adapted):
    *_, model = adapted
    expected = predict(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = merge_lora(model)
    assert type(plain) is DetrForDetection
    assert not any("lora" in name or "base_layer" in name for name in plain.state_dict())
    for ours, theirs in zip(predict(plain), expected, strict=True):
        assert relative_difference(ours, theirs) < 1e-5
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert any(p.requires_grad for p in plain.model.encoder.parameters())
    train(model, steps=1)
    assert not torch.equal(predict(model)[0], expected[0])


def test_what_is_saved_loads_without_peft(adapted, tmp_path):
    *_, model = adapted
    merge_lora(model).save_pretrained(tmp_path)
    torch.save(predict(model), tmp_path / "expected.pt")
    torch.save({name: value for name, value in batch().items() if name != "labels"}, tmp_path / "batch.pt")
    code = f"""
import sys
sys.modules["peft"] = None
import torch
from hf_detr import DetrForDetection
model, info = DetrForDetection.from_pretrained({str(tmp_path)!r}, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
with torch.no_grad():
    outputs = model(**torch.load({str(tmp_path / "batch.pt")!r}))
for ours, theirs in zip((outputs.logits, outputs.pred_boxes), torch.load({str(tmp_path / "expected.pt")!r})):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_gradient_checkpointing_does_not_cut_the_updates_off():
    model = add_lora(trained_model(query_type="anchor"), RANK)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.train().zero_grad()
        torch.manual_seed(0)
        model(**batch()).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_errors_say_what_to_do(monkeypatch):
    model = add_lora(trained_model(), RANK)
    with pytest.raises(ValueError, match="Merge them first"):
        add_lora(model, RANK)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        add_lora(trained_model(), 0)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"hf_detr\[lora\]"):
        add_lora(trained_model(), RANK)
