"""`DetrTrainer`: an optimizer step is the same however its images are divided into batches and processes."""

import pytest
import torch
import transformers
from conftest import random_labels, tiny_model
from script_runner import run_script
from torch.utils.data import SequentialSampler

from hf_detr.training import DetrTrainer

COUNTS = [1, 7, 0, 3]  # objects per image
STEP = {"max_grad_norm": 0.0, "learning_rate": 1.0, "optim": "sgd", "lr_scheduler_type": "constant", "max_steps": 1}


class _InOrder(DetrTrainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def _images():
    generator = torch.Generator().manual_seed(0)
    labels = random_labels(COUNTS)
    return [{"pixel_values": torch.rand(3, 64, 64, generator=generator), "labels": label} for label in labels]


def _collate(images):
    return {
        "pixel_values": torch.stack([image["pixel_values"] for image in images]),
        "labels": [image["labels"] for image in images],
    }


def _model():
    torch.manual_seed(0)
    return tiny_model(dropout=0.0, class_loss="cross_entropy")


def _train(rank, folder, batch_size, accumulation):
    arguments = transformers.TrainingArguments(
        folder, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulation, use_cpu=True,
        remove_unused_columns=False, report_to="none", save_strategy="no", disable_tqdm=True, **STEP,
    )  # fmt: skip
    trainer = _InOrder(_model(), arguments, data_collator=_collate, train_dataset=_images())
    logged = trainer.train()
    if rank == 0:
        torch.save((trainer.model.state_dict(), logged.training_loss), f"{folder}/after.pt")
    trainer.accelerator.end_training()


@pytest.fixture(scope="module")
def expected():
    """By PyTorch alone: all images in one batch, and w - gradient."""
    model = _model().train()
    loss = model(**_collate(_images())).loss
    loss.backward()
    moved = {name: p.detach() - p.grad for name, p in model.named_parameters() if p.grad is not None}
    return model, moved, loss.item()


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "processes"), [(4, 1, 1), (2, 2, 1), (1, 4, 1), (3, 2, 1), (2, 1, 2), (1, 2, 2)]
)
def test_a_step_does_not_depend_on_how_its_images_are_divided(tmp_path, expected, batch_size, accumulation, processes):
    start, moved, loss = expected
    code, output = run_script(_train, str(tmp_path), batch_size, accumulation, cwd=tmp_path, processes=processes)
    assert code == 0, output
    after, logged = torch.load(tmp_path / "after.pt")
    if processes == 1:  # at the end, `Trainer` reports the share of its first process
        assert logged == pytest.approx(loss, rel=1e-5)
    for name, weight in start.named_parameters():
        step = moved.get(name, weight.detach()) - weight.detach()
        torch.testing.assert_close(after[name] - weight.detach(), step, rtol=1e-3, atol=2e-6)


def test_the_trainer_of_transformers_weighs_objects_by_their_batch(tmp_path, expected):
    """What `DetrTrainer` is for: if this fails, transformers counts the objects, and it can go."""
    start, moved, _ = expected
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=1, gradient_accumulation_steps=4, use_cpu=True,
        remove_unused_columns=False, report_to="none", save_strategy="no", disable_tqdm=True, **STEP,
    )  # fmt: skip
    trainer = transformers.Trainer(_model(), arguments, data_collator=_collate, train_dataset=_images())
    trainer.train()
    name = "class_labels_classifier.weight"
    before = dict(start.named_parameters())[name].detach()
    exact, found = moved[name] - before, trainer.model.get_parameter(name).detach() - before
    assert (found - exact).norm() > 0.05 * exact.norm()
