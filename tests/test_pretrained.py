"""Loading and saving: nothing is silently random, classes and queries are fitted, saved weights are ours."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import save_v4, their_model
from conftest import tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from hf_detr import DetrConfig, DetrForDetection, DetrModel
from hf_detr.model.pretrained import read_stored_config

NAMES = {0: "N/A", 1: "cat", 2: "dog", 3: "N/A", 4: "bird"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Read only."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(id2label=NAMES, label2id={name: index for index, name in NAMES.items()}).save_pretrained(folder)
    return folder


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_detr"), "propagate", True)
    return caplog


def head(model: DetrForDetection) -> torch.Tensor:
    layer = model.class_labels_classifier
    return torch.cat((layer.weight, layer.bias[:, None]), dim=1).detach()


# -- other checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["learned", "pre_norm_learned_positions", "anchors"])
def test_checkpoints_saved_by_version_0_1_give_the_same_outputs(name):
    """They were saved by that version, with its outputs, before weights were renamed."""
    folder = Path(__file__).parent / "fixtures" / "checkpoints_0_1" / name
    model, info = DetrForDetection.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert not hasattr(model.config, "query_groups")  # for training only, and retired since
    pixel_values = torch.linspace(-60, 60, 2 * 3 * 64 * 96).sin().reshape(2, 3, 64, 96)
    pixel_mask = torch.ones(2, 64, 96, dtype=torch.long)
    pixel_values[1, :, :, 70:], pixel_mask[1, :, 70:] = 0, 0
    with torch.no_grad():
        outputs = model(pixel_values, pixel_mask)
    for key, expected in load_file(folder / "expected.safetensors").items():
        torch.testing.assert_close(outputs[key], expected, rtol=0, atol=1e-5)


def test_without_the_package_other_checkpoints_are_named_in_a_clear_error(tmp_path, monkeypatch):
    """As in a model repository (see test_hub.py), whose files are copies of those in `model/`."""
    save_v4(their_model(), tmp_path)
    for name in [name for name in sys.modules if name.split(".")[:2] == ["hf_detr", "interop"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "hf_detr.interop", None)  # importing it raises ModuleNotFoundError
    message = r'reads only hf_detr checkpoints; `pip install hf_detr` to read a "detr" checkpoint'
    with pytest.raises(ValueError, match=message):
        DetrForDetection.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        DetrConfig.from_pretrained(tmp_path)
    monkeypatch.undo()
    assert DetrForDetection.from_pretrained(tmp_path).config.backbone == "test_resnet", "imported when it is needed"


# -- classes and queries ---------------------------------------------------------------------------------------------


def test_classes_keep_their_weights_by_name(checkpoint, warnings):
    old = head(DetrForDetection.from_pretrained(checkpoint))
    names = {0: "bird", 1: "cow", 2: "N/A", 3: "cat", 4: "sheep", 5: "horse"}
    model, info = DetrForDetection.from_pretrained(
        checkpoint, id2label=names, ignore_mismatched_sizes=True, output_loading_info=True
    )
    new = head(model)
    assert new.shape == (7, 33)
    for row, old_row in ((0, 4), (3, 1), (6, 5)):  # bird, cat, no object
        assert torch.equal(new[row], old[old_row])
    for row in (1, 2, 4, 5):  # "N/A" occurs twice and so says nothing
        assert not any(torch.equal(new[row], old_row) for old_row in old)
        assert new[row].abs().max() <= 32**-0.5, "PyTorch's own initialisation"
    assert model.config.id2label == names
    assert model.config.label2id["horse"] == 5
    assert "2 keep their weights by name, 4 start at random (cow, N/A, sheep, horse), 3 are dropped" in warnings.text
    assert info["mismatched_keys"] == {
        ("class_labels_classifier.weight", torch.Size((6, 32)), torch.Size((7, 32))),
        ("class_labels_classifier.bias", torch.Size((6,)), torch.Size((7,))),
    }


def test_another_number_of_classes_is_an_error_unless_it_is_allowed(checkpoint):
    with pytest.raises(RuntimeError, match=r"has 5 classes, not 2\. With ignore_mismatched_sizes=True"):
        DetrForDetection.from_pretrained(checkpoint, id2label={0: "cat", 1: "dog"})
    with pytest.raises(RuntimeError, match="has 12 queries, not 20"):
        DetrForDetection.from_pretrained(checkpoint, num_queries=20)
    with pytest.raises(ValueError, match="num_labels=3, but there are names for 2"):
        DetrForDetection.from_pretrained(checkpoint, id2label={0: "cat", 1: "dog"}, num_labels=3)
    with pytest.raises(ValueError, match=r"must be 0 to 1, got \[1, 2\]"):
        DetrForDetection.from_pretrained(checkpoint, id2label={1: "cat", 2: "dog"}, ignore_mismatched_sizes=True)


def test_as_many_classes_of_other_names_are_renamed_or_matched(checkpoint, warnings):
    old = head(DetrForDetection.from_pretrained(checkpoint))
    names = dict(enumerate(("-", "dog", "cat", "--", "Vogel")))
    renamed = DetrForDetection.from_pretrained(checkpoint, id2label=names)
    assert torch.equal(head(renamed), old)
    assert renamed.config.id2label == names
    assert "taken as the same classes in the same order" in warnings.text
    matched = head(DetrForDetection.from_pretrained(checkpoint, id2label=names, ignore_mismatched_sizes=True))
    assert torch.equal(matched[1], old[2])
    assert torch.equal(matched[2], old[1])
    assert not torch.equal(matched[4], old[4])


def test_the_base_model_has_no_classes_to_fit(checkpoint):
    assert DetrModel.from_pretrained(checkpoint, num_labels=2).config.num_labels == 2


def test_an_adapter_takes_its_base_model_s_config(checkpoint, tmp_path):
    """What PEFT does from there on needs PEFT; that the base checkpoint is recognised does not."""
    save_v4(their_model(), tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    about = {"base_model_name_or_path": str(tmp_path / "base"), "peft_type": "LORA"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(about))
    assert read_stored_config(tmp_path / "adapter", {}, required=True)["model_type"] == "detr"


def test_names_that_say_nothing_match_nothing(tmp_path):
    tiny_model().save_pretrained(tmp_path)  # LABEL_0 ... LABEL_4
    old = head(DetrForDetection.from_pretrained(tmp_path))
    new = head(DetrForDetection.from_pretrained(tmp_path, num_labels=2, ignore_mismatched_sizes=True))
    assert torch.equal(new[2], old[5])
    assert not torch.equal(new[0], old[0])


@pytest.mark.parametrize("num_queries", [7, 30])
def test_the_queries_that_fit_are_kept(checkpoint, num_queries, warnings):
    old = DetrForDetection.from_pretrained(checkpoint).model.query_position_embeddings.weight
    model = DetrForDetection.from_pretrained(checkpoint, num_queries=num_queries, ignore_mismatched_sizes=True)
    new = model.model.query_position_embeddings.weight
    kept = min(num_queries, 12)
    assert torch.equal(new[:kept], old[:kept])
    assert len(new) == num_queries == model.config.num_queries
    assert model(torch.randn(1, 3, 64, 64)).logits.shape[1] == num_queries
    assert f"12 to {num_queries}, the first {kept} keep their weights" in warnings.text
    if num_queries > 12:
        assert 0.5 < new[12:].std() < 1.5


def test_a_config_of_one_s_own_is_fitted_too(checkpoint):
    config = tiny_config(id2label={0: "dog"}, label2id={"dog": 0}, num_queries=5, dropout=0.3)
    old = head(DetrForDetection.from_pretrained(checkpoint))
    model = DetrForDetection.from_pretrained(checkpoint, config=config, ignore_mismatched_sizes=True)
    assert torch.equal(head(model), old[[2, 5]])
    assert (model.config.num_queries, model.config.dropout, model.config.id2label) == (5, 0.3, {0: "dog"})
    assert config.num_queries == 5, "the caller's config is left alone"


def test_a_fitted_published_checkpoint_trains_and_saves(tmp_path):
    save_v4(their_model(), tmp_path / "theirs")
    model = DetrForDetection.from_pretrained(
        tmp_path / "theirs", id2label={0: "cat"}, num_queries=4, ignore_mismatched_sizes=True
    ).train()
    labels = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    model(torch.randn(1, 3, 64, 64), labels=labels).loss.backward()
    assert model.class_labels_classifier.weight.grad.abs().sum() > 0
    assert model.model.query_position_embeddings.weight.grad.abs().sum() > 0
    assert not any(p.requires_grad for n, p in model.named_parameters() if "layer1" in n), "frozen as in the paper"
    model.save_pretrained(tmp_path / "ours")
    assert DetrForDetection.from_pretrained(tmp_path / "ours").config.id2label == {0: "cat"}


# -- reports ---------------------------------------------------------------------------------------------------------


def test_missing_and_unexpected_weights_are_reported(checkpoint, tmp_path, warnings):
    shutil.copytree(checkpoint, tmp_path / "broken")
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.decoder.layers.0.surprise.weight"] = weights.pop("model.encoder.layers.1.mlp.fc1.weight")
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    model, info = DetrForDetection.from_pretrained(tmp_path / "broken", output_loading_info=True)
    assert info["missing_keys"] == {"model.encoder.layers.1.mlp.fc1.weight"}
    assert info["unexpected_keys"] == {"model.decoder.layers.0.surprise.weight"}
    assert "MISSING" in warnings.text
    assert "UNEXPECTED" in warnings.text
    assert model.model.encoder.layers[1].mlp.fc1.weight.std() > 0.01, "the paper's initialisation, not empty memory"


def test_mismatched_weights_are_an_error_or_reported(checkpoint, warnings):
    with pytest.raises(RuntimeError):
        DetrForDetection.from_pretrained(checkpoint, encoder_ffn_dim=64)
    assert "MISMATCH" in warnings.text
    _, info = DetrForDetection.from_pretrained(
        checkpoint, encoder_ffn_dim=64, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert len(info["mismatched_keys"]) == 2 * 3  # weight and bias of fc1, weight of fc2


def test_a_complete_checkpoint_is_loaded_without_a_word(checkpoint, warnings):
    DetrForDetection.from_pretrained(checkpoint)
    DetrForDetection.from_pretrained(checkpoint, freeze_batch_norm=False, frozen_stages=-1)
    assert warnings.text == ""


def test_no_checkpoint_says_so(tmp_path):
    with pytest.raises(OSError, match=r"config\.json"):
        DetrForDetection.from_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    assert DetrForDetection.from_pretrained(tmp_path / "bare", config=tiny_config()).config.num_queries == 12
    tiny_config().save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        DetrForDetection.from_pretrained(tmp_path)


# -- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [False, True])
def test_what_came_with_other_names_is_saved_under_ours_and_stays_byte_for_byte(table, tmp_path):
    save_v4(their_model(kind="table" if table else "detr"), tmp_path / "theirs")
    model = DetrForDetection.from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "first")
    saved = load_file(tmp_path / "first" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    fresh = DetrForDetection(DetrConfig.from_pretrained(tmp_path / "first"))
    fresh.load_state_dict(saved, strict=True)
    DetrForDetection.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name
    assert json.loads((tmp_path / "first" / "config.json").read_text())["model_type"] == "hf_detr"


def test_shards_are_written_and_read(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again, info = DetrForDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_base_and_detection_models_load_from_each_other(checkpoint, tmp_path):
    base, info = DetrModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    base.save_pretrained(tmp_path / "base")
    model, info = DetrForDetection.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"class_labels_classifier"}
    query = "query_position_embeddings.weight"
    assert torch.equal(model.model.state_dict()[query], base.state_dict()[query])
