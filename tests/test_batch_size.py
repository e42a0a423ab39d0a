"""Finding the batch that fits: all processes agree, the global batch stays, and a trial leaves no trace."""

import gc

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from conftest import tiny_model
from script_runner import run_script

from hf_detr import DetrImageProcessor
from hf_detr.data import DetectionCollator, image_sizes, resized_sizes
from hf_detr.training import parameter_groups
from hf_detr.training.batch_size import find_batch_size, most_expensive, trial_step


@pytest.fixture(autouse=True)
def _no_garbage_collection(monkeypatch):
    """Accelerate collects garbage after each try, which takes a second in a process with as much in it as this one."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


def memory_for(most, tried):
    def step(batch_size):
        tried.append(batch_size)
        if batch_size > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return step


@pytest.mark.parametrize(
    ("wanted", "most", "tries"),
    [(12, 12, [12]), (12, 5, [12, 6, 4]), (32, 9, [32, 16, 8]), (7, 6, [7, 1]), (1, 1, [1])],
)
def test_the_largest_divisor_that_fits_keeps_the_global_batch(wanted, most, tries):
    tried = []
    found = find_batch_size(memory_for(most, tried), wanted, Accelerator(cpu=True))
    assert tried == tries
    assert found == tries[-1]
    assert found * (wanted // found) == wanted


def test_where_nothing_fits_it_says_what_helps():
    with pytest.raises(RuntimeError, match=r"Not even one image fits into memory\. Smaller images"):
        find_batch_size(memory_for(0, []), 8, Accelerator(cpu=True))


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def step(batch_size):
        raise RuntimeError("The size of tensor a must match the size of tensor b")

    with pytest.raises(RuntimeError, match="must match"):
        find_batch_size(step, 8, Accelerator(cpu=True))


def find_on_two(rank, folder):
    tried = []
    found = find_batch_size(memory_for((6, 3)[rank], tried), 12, Accelerator(cpu=True))
    torch.save((found, tried), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_processes_agree_on_what_fits_all_of_them(tmp_path):
    code, said = run_script(find_on_two, tmp_path, cwd=tmp_path, processes=2)
    assert code == 0, said
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)] == [(3, [12, 6, 4, 3])] * 2


def rows_of(sizes):
    objects = {"bbox": [[4.0, 4.0, 20.0, 20.0]], "category": [1], "area": [400.0], "iscrowd": [0], "id": [1]}
    return [
        {"image_id": index, "image": torch.zeros(3, *size, dtype=torch.uint8), "height": size[0], "width": size[1],
         "objects": objects}
        for index, size in enumerate(sizes)
    ]  # fmt: skip


def test_a_trial_is_as_large_as_any_batch_and_leaves_no_trace():
    rows = rows_of([(48, 64), (32, 96), (96, 40), (80, 80), (40, 40)])
    processor = DetrImageProcessor(size={"max_height": 96, "max_width": 96})
    shapes = []

    def collate(chosen):
        batch = DetectionCollator(processor)(chosen)
        shapes.append(tuple(batch["pixel_values"].shape))
        return batch

    model = tiny_model(query_type="anchor", denoising_groups=2, freeze_batch_norm=False, frozen_stages=-1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    optimizers = []

    def build_optimizer(copy):
        optimizers.append(torch.optim.AdamW(parameter_groups(copy, 1e-3, 1e-3, 1e-4)))
        return optimizers[-1]

    sizes = resized_sizes(image_sizes(rows), dict(processor.size))
    step = trial_step(model, build_optimizer, rows, most_expensive(sizes), collate, Accelerator(cpu=True))
    for batch_size in (1, 2, 7):
        step(batch_size)
    assert [shape[0] for shape in shapes] == [1, 2, 7]
    assert shapes[0][2:] == (96, 96)
    assert all(shape[2:] == (96, 96) for shape in shapes[1:])
    assert all(optimizer.state for optimizer in optimizers), "the optimizer's memory is in it"
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


def test_with_masks_an_image_takes_memory_for_each_of_its_objects():
    sizes, counts = [(48, 64), (64, 64), (40, 40), (48, 48)], [9, 1, 30, 0]
    assert most_expensive(sizes, counts)(1) == [2]
    assert most_expensive(sizes)(1) == [1]
    assert most_expensive(sizes, counts)(4) == [1, 0, 2, 0]  # the tallest, the widest, then by pixels times objects
