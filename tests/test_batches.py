"""Batches of similar aspect ratios, each image exactly once, on any number of processes."""

import multiprocessing
import os
from collections import Counter

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from PIL import Image
from torch.utils.data import Subset

from hf_detr import DetrImageProcessor
from hf_detr.data.augmentation import paper_augmentation
from hf_detr.data.augmented_dataset import AugmentedDataset
from hf_detr.data.batching import (
    AspectRatioBatches,
    DistributedBatches,
    image_sizes,
    padding_fraction,
)
from hf_detr.data.collate import DetectionCollator
from hf_detr.data.loader import build_loader
from hf_detr.data.schema import detection_features
from hf_detr.model.processor_size import resized_sizes

COUNTS = [(1, 1, 1), (100, 32, 1), (100, 32, 2), (101, 4, 3), (7, 16, 2), (5, 1, 2), (64, 8, 4), (11, 1, 8), (4, 2, 4)]


def random_sizes(count, seed=0):
    """(height, width), from aspect ratio 1 : 3 to 3 : 1."""
    ratios = np.exp(np.random.default_rng(seed).uniform(-1.1, 1.1, count))
    return [(round(100 * ratio**-0.5), round(100 * ratio**0.5)) for ratio in ratios]


def on_each_process(kind, count, batch_size, processes, **options):
    given = random_sizes(count) if kind is AspectRatioBatches else count
    return [kind(given, batch_size, num_processes=processes, process_index=i, **options) for i in range(processes)]


@pytest.mark.parametrize("kind", [DistributedBatches, AspectRatioBatches])
class TestCoverage:
    @pytest.mark.parametrize(("count", "batch_size", "processes"), COUNTS)
    @pytest.mark.parametrize("shuffle", [True, False])
    def test_all_processes_together_hold_each_image_once(self, kind, count, batch_size, processes, shuffle):
        samplers = on_each_process(kind, count, batch_size, processes, shuffle=shuffle)
        for epoch in range(3):
            for sampler in samplers:
                sampler.set_epoch(epoch)
            batches_of = [list(sampler) for sampler in samplers]
            assert [len(own) for own in batches_of] == [len(sampler) for sampler in samplers]
            assert len({len(own) for own in batches_of}) == 1
            batches = [batch for own in batches_of for batch in own]
            assert Counter(index for batch in batches for index in batch) == Counter(range(count))
            sizes = {len(batch) for batch in batches}
            assert max(sizes) - min(sizes) <= 1
            assert max(sizes) <= (batch_size if batch_size > 1 else 2)
            assert len(batches_of[0]) == min(-(-count // (batch_size * processes)), count // processes)

    def test_an_epoch_is_a_function_of_seed_and_epoch(self, kind):
        first, again = on_each_process(kind, 50, 4, 1) + on_each_process(kind, 50, 4, 1)
        other_seed = on_each_process(kind, 50, 4, 1, seed=1)[0]
        torch.manual_seed(99)
        np.random.seed(99)
        again.set_epoch(3)
        again.set_epoch(0)
        assert list(first) == list(first) == list(again)
        again.set_epoch(1)
        assert list(first) != list(again)
        assert list(first) != list(other_seed)

    def test_drop_last_drops_different_images_each_epoch(self, kind):
        samplers = on_each_process(kind, 23, 4, 2, drop_last=True)
        dropped = []
        for epoch in range(4):
            for sampler in samplers:
                sampler.set_epoch(epoch)
            seen = [index for sampler in samplers for batch in sampler for index in batch]
            assert all(len(batch) == 4 for sampler in samplers for batch in sampler)
            assert len(seen) == len(set(seen)) == 16
            dropped.append(frozenset(range(23)) - set(seen))
        assert len(set(dropped)) == 4

    def test_too_few_images_are_an_error(self, kind):
        with pytest.raises(ValueError, match="2 images are too few for 3 processes: at least 3 are needed"):
            on_each_process(kind, 2, 4, 3)
        with pytest.raises(ValueError, match="7 images are too few for 2 processes with full batches of 4 each"):
            on_each_process(kind, 7, 4, 2, drop_last=True)

    def test_with_allow_empty_some_processes_have_no_batch(self, kind):
        samplers = on_each_process(kind, 2, 4, 3, shuffle=False, allow_empty=True)
        assert sorted(list(sampler) for sampler in samplers) == [[], [[0]], [[1]]]
        assert sorted(map(len, samplers)) == [0, 1, 1]
        assert [list(sampler) for sampler in on_each_process(kind, 0, 4, 2, allow_empty=True)] == [[], []]

    def test_invalid_arguments_are_an_error(self, kind):
        for changes in ({"seed": -1}, {"process_index": 2, "num_processes": 2}, {"process_index": -1}):
            with pytest.raises(ValueError, match="process_index in"):
                kind([(1, 1)] * 4 if kind is AspectRatioBatches else 4, 2, **changes)


class TestAspectRatio:
    def test_unshuffled_batches_of_one_process_are_in_order(self):
        assert list(DistributedBatches(5, 2, shuffle=False)) == [[0, 1], [2, 3], [4]]

    def test_unshuffled_groups_run_from_tall_to_wide(self):
        sizes = random_sizes(500)
        order = [index for batch in AspectRatioBatches(sizes, 4, shuffle=False) for index in batch]
        ratios = [sizes[index][1] / sizes[index][0] for index in order]
        assert ratios == sorted(ratios)

    @pytest.mark.parametrize("processes", [1, 2])
    def test_grouping_saves_most_of_the_padding(self, processes):
        sizes = resized_sizes(random_sizes(1000), {"shortest_edge": 800, "longest_edge": 1333})
        plain = padding_fraction(DistributedBatches(1000, 4, num_processes=processes).batches(), sizes)
        grouped = padding_fraction(AspectRatioBatches(sizes, 4, num_processes=processes).batches(), sizes)
        assert plain > 0.2
        assert grouped < plain / 5

    def test_an_image_batches_of_its_batch_with_different_images_each_epoch(self):
        sampler = AspectRatioBatches(random_sizes(2000), 4)
        pairs = []
        for epoch in range(2):
            sampler.set_epoch(epoch)
            pairs.append({frozenset((a, b)) for batch in sampler for a in batch for b in batch if a != b})
        assert len(pairs[0] & pairs[1]) < 0.05 * len(pairs[0])

    def test_batches_do_not_run_from_tall_to_wide(self):
        sizes = random_sizes(400)
        means = [np.mean([np.log(sizes[i][1] / sizes[i][0]) for i in batch]) for batch in AspectRatioBatches(sizes, 4)]
        assert abs(np.corrcoef(means, range(len(means)))[0, 1]) < 0.3


class TestPadding:
    def test_by_hand(self):
        """10 x 20 and 20 x 10, both padded to 20 x 20: half is padding. In batches of one there is none."""
        sizes = [(10, 20), (20, 10)]
        assert padding_fraction([[0, 1]], sizes) == 0.5
        assert padding_fraction([[0], [1]], sizes) == 0
        assert padding_fraction([[0, 1], [0]], sizes) == pytest.approx(1 - 600 / 1000)
        assert padding_fraction([], sizes) == 0

    @pytest.mark.parametrize(
        "size",
        [
            {"shortest_edge": 80, "longest_edge": 133},
            {"shortest_edge": 80},
            {"height": 64, "width": 96},
            {"max_height": 70, "max_width": 50},
        ],
    )
    def test_sizes_and_padding_are_those_of_the_processors_batches(self, size):
        processor = DetrImageProcessor(size=size)
        sizes = [(33, 70), (48, 64), (90, 41), (120, 30)]
        resized = resized_sizes(sizes, processor.size)
        batch = processor([Image.new("RGB", (w, h)) for h, w in sizes], return_tensors="pt")
        found = [(int(m[:, 0].sum()), int(m[0].sum())) for m in batch["pixel_mask"]]
        assert resized == found
        padded = 1 - batch["pixel_mask"].float().mean().item()
        assert padding_fraction([range(4)], resized) == pytest.approx(padded)

    def test_sizes_are_read_without_opening_an_image(self):
        rows = [make_row(index, width=50 + index, height=40, image=None) for index in range(5)]
        stored = Dataset.from_list(rows, features=detection_features(["a"]))
        expected = [(40, 50 + index) for index in range(5)]
        assert image_sizes(rows) == image_sizes(stored) == image_sizes(AugmentedDataset(stored, dict)) == expected
        assert image_sizes(stored.select([4, 1])) == image_sizes(Subset(rows, [4, 1])) == [(40, 54), (40, 51)]


def make_row(image_id, width=48, height=32, **changes):
    return {
        "image": Image.new("RGB", (width, height), (image_id, 0, 0)),
        "image_id": image_id,
        "file_name": "a.png",
        "width": width,
        "height": height,
        "objects": {"id": [1], "bbox": [[2.0, 2.0, 9.0, 8.0]], "category": [0], "area": [72.0], "iscrowd": [0]},
    } | changes


def make_rows(count):
    return [make_row(i, width=w, height=h) for i, (h, w) in enumerate(random_sizes(count))]


@pytest.fixture
def accelerator():
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield Accelerator(cpu=True, gradient_accumulation_steps=2)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def image_ids(loader):
    return [[label["image_id"].item() for label in batch["labels"]] for batch in loader]


PROCESSOR = DetrImageProcessor(size={"height": 32, "width": 32})


class TestLoader:
    def test_gradients_accumulate_over_each_epoch_to_its_last_batch(self, accelerator):
        """5 batches, 2 per step: a step after batches 2, 4 and 5, in every epoch."""
        loader = build_loader(
            make_rows(10), DetectionCollator(PROCESSOR), batch_size=2, training=True, accelerator=accelerator
        )
        model = torch.nn.Linear(1, 1)
        assert accelerator.prepare(loader) is loader
        for _ in range(2):
            stepped = []
            for _batch in loader:
                with accelerator.accumulate(model):
                    stepped.append(accelerator.sync_gradients)
            assert stepped == [False, True, False, True, True]

    def test_the_epoch_reaches_batches_and_augmentation_in_workers(self, accelerator):
        """Equal to batches made by hand, epoch by epoch, with persistent workers."""
        dataset = AugmentedDataset(make_rows(9), paper_augmentation({"shortest_edge": 32, "longest_edge": 53}), seed=2)
        collate = DetectionCollator(PROCESSOR)
        loaders = {
            workers: build_loader(
                dataset, collate, batch_size=4, training=True, seed=5, num_workers=workers, accelerator=accelerator
            )
            for workers in (0, 2)
        }
        for epoch in (4, 5):
            sampler = AspectRatioBatches(image_sizes(dataset), 4, seed=5)
            sampler.set_epoch(epoch)
            dataset.set_epoch(epoch)
            expected = [collate([dataset[index] for index in batch]) for batch in sampler]
            dataset.set_epoch(0)
            for loader in loaders.values():
                loader.set_epoch(epoch)
                batches = list(loader)
                assert len(batches) == len(loader) == len(expected)
                for ours, theirs in zip(batches, expected, strict=True):
                    assert ours["pixel_values"].equal(theirs["pixel_values"])

    def test_the_global_generator_is_not_changed(self, accelerator):
        loader = build_loader(
            make_rows(6), DetectionCollator(PROCESSOR), batch_size=2, training=True, accelerator=accelerator
        )
        before = torch.get_rng_state()
        list(loader)
        assert torch.get_rng_state().equal(before)

    def test_evaluation_reads_in_order_and_nothing_twice(self):
        loader = build_loader(make_rows(7), DetectionCollator(PROCESSOR), batch_size=3, training=False)
        assert image_ids(loader) == [[0, 1, 2], [3, 4], [5, 6]]

    def test_results_of_the_last_batch_are_not_cut_off(self, accelerator):
        """Accelerate's `gather_for_metrics` cuts off results by the `batch_size` of a loader; here it is 3, 2 and 2."""
        loader = build_loader(
            make_rows(7), DetectionCollator(PROCESSOR), batch_size=3, training=False, accelerator=accelerator
        )
        ids = [accelerator.gather_for_metrics(torch.cat([x["image_id"] for x in batch["labels"]])) for batch in loader]
        assert torch.cat(ids).tolist() == list(range(7))

    def test_workers_use_one_thread_and_different_seeds(self):
        seen = []
        for _ in range(2):
            loader = build_loader(make_rows(4), report_worker, batch_size=1, training=False, seed=3, num_workers=2)
            seen.append(list(loader))
        assert {threads for threads, *_ in seen[0]} == {1}
        assert len({draw for _, _, draw in seen[0][:2]}) == 2
        assert seen[0] == seen[1]

    def test_streamed_datasets_are_an_error(self):
        stream = Dataset.from_list([{"a": 1}]).to_iterable_dataset()
        with pytest.raises(TypeError, match="no length"):
            build_loader(stream, list, batch_size=1, training=True)


def report_worker(rows):
    return torch.get_num_threads(), torch.utils.data.get_worker_info().id, torch.rand(()).item()


def _one_of_two_processes(rank, port, shared_dataset, read_once, epoch_set, results):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    found = {"world": accelerator.num_processes}
    dataset = AugmentedDataset(make_rows(21), paper_augmentation(PROCESSOR.size), seed=1)
    collate = DetectionCollator(PROCESSOR)
    options = {"batch_size": 4, "accelerator": accelerator}
    train = accelerator.prepare(build_loader(dataset, collate, training=True, **options))
    model = accelerator.prepare(torch.nn.Linear(1, 1))
    for epoch in (1, 2):
        train.set_epoch(epoch)
        found[f"train {epoch}"], found[f"steps {epoch}"] = [], []
        for batch in train:
            with accelerator.accumulate(model):  # collective: hangs if the processes had different numbers of batches
                accelerator.backward(model(batch["pixel_values"].mean().reshape(1, 1)).sum())
                found[f"steps {epoch}"].append(accelerator.sync_gradients)
            found[f"train {epoch}"].append([label["image_id"].item() for label in batch["labels"]])
    for count in (9, 1):
        found[f"eval {count}"] = image_ids(build_loader(make_rows(count), collate, training=False, **options))
    if rank == 0:
        found["shared"] = [shared_dataset[0]["image"].numpy()]
        read_once.set()
        assert epoch_set.wait(timeout=60)
        found["shared"].append(shared_dataset[0]["image"].numpy())
    results[rank] = found
    accelerator.end_training()


@pytest.fixture(scope="module")
def two_processes():
    """What two processes, not forked from this one, found; and a dataset whose epoch was set here while they ran."""
    dataset = AugmentedDataset([make_row(0)], paper_augmentation({"height": 64, "width": 64}), seed=3)
    multiprocessing.set_forkserver_preload(["hf_detr.data", "accelerate"])  # imported once for both
    context = multiprocessing.get_context("forkserver")
    with context.Manager() as manager:
        results, read_once, epoch_set = manager.dict(), manager.Event(), manager.Event()
        arguments = (20000 + os.getpid() % 20000, dataset, read_once, epoch_set, results)
        running = mp.start_processes(_one_of_two_processes, arguments, 2, join=False, start_method="forkserver")
        while not read_once.wait(timeout=0.1):
            assert not running.join(timeout=0.1), "the processes ended early"
        dataset.set_epoch(1)
        epoch_set.set()
        while not running.join():
            pass
        return results[0], results[1], dataset


def test_two_processes_share_every_epoch_exactly(two_processes):
    first, second, _ = two_processes
    assert first["world"] == second["world"] == 2
    for epoch in (1, 2):
        batches = first[f"train {epoch}"], second[f"train {epoch}"]
        assert len(batches[0]) == len(batches[1]) == 3
        assert sorted(i for own in batches for batch in own for i in batch) == list(range(21))
        assert {len(batch) for own in batches for batch in own} == {3, 4}
        assert first[f"steps {epoch}"] == second[f"steps {epoch}"] == [False, True, True]
    assert first["train 1"] != first["train 2"]
    assert (first["eval 9"], second["eval 9"]) == ([[0, 1, 2], [5, 6]], [[3, 4], [7, 8]])
    assert (first["eval 1"], second["eval 1"]) == ([[0]], [])


def test_processes_that_are_not_forked_see_the_epoch_of_an_augmented_dataset(two_processes):
    """As workers of a loader whose start method is "spawn": they have a pickled copy."""
    images, dataset = two_processes[0]["shared"], two_processes[2]
    for epoch, image in enumerate(images):
        dataset.set_epoch(epoch)
        assert np.array_equal(dataset[0]["image"].numpy(), image)
    assert not np.array_equal(images[0], images[1])
