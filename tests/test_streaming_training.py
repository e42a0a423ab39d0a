"""`finetune.py --streaming`: runs on images in shards, in a folder and on a Hub."""

import json
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_client import HubClients
from hub_server import HubServer
from safetensors.torch import load_file
from script_runner import run_script
from shards import contents, write_parquet, write_webdataset

from hf_detr.data import draw_shapes_dataset, load_detection_dataset, loader
from hf_detr.data.streaming import ShardedBatches
from hf_detr.training import TrainingRun
from hf_detr.training.arguments import parse_finetune_args

pytestmark = pytest.mark.xdist_group("streaming")
EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune.py"
COUNTS = (13, 9, 2, 16)
SMALL = [
    "--backbone", "test_resnet", "--backbone_weights", "none", "--image_size", "64", "--seed", "3", "--epochs", "2",
    "--batch_size", "4", "--learning_rate", "1e-3",
    "--set", "d_model=32", "encoder_layers=1", "decoder_layers=1", "encoder_ffn_dim=32", "decoder_ffn_dim=32",
    "num_queries=6",
]  # fmt: skip
STREAMED = [*SMALL, "--streaming", "--shuffle_buffer", "8"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("streamed")
    drawn = draw_shapes_dataset(folder / "drawn", num_train=sum(COUNTS), num_val=6, progress=False)
    for split, counts in (("train", COUNTS), ("validation", (6,))):
        name = "train" if split == "train" else "val"
        rows = contents(load_detection_dataset(drawn, name, cache_dir=folder / "cache", progress=False))
        write_webdataset(folder / "tars", split, rows, counts)
        write_parquet(folder / "parquet", split, rows, counts)
    return folder


def weights(run):
    return load_file(run / "last" / "model.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def batches_of_a_stream():
    """Lets a run on images on disk have the batches of one that streams them."""
    places = np.array([(shard, row) for shard, count in enumerate(COUNTS) for row in range(count)])

    def planned(sizes, batch_size, *, shuffle, allow_empty, **options):
        return ShardedBatches(places, sizes, batch_size, shuffle_buffer=8, **options) if shuffle else kept(
            len(sizes), batch_size, shuffle=False, allow_empty=allow_empty, **options
        )  # fmt: skip

    kept = loader.DistributedBatches
    loader.AspectRatioBatches = planned


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_equals_one_on_disk_with_the_same_order(folder, tmp_path, processes):
    """Bit by bit; and reading annotations from Parquet or from archives, with or without workers."""
    runs, unmixed = {}, ("--mosaic", "0", "--copy_paste", "0")  # streamed images are not mixed
    for name, arguments, setup in (
        ("disk", [*SMALL, *unmixed, "--dataset", folder / "tars", "--num_workers", "0"], batches_of_a_stream),
        ("tars", [*STREAMED, "--dataset", folder / "tars", "--num_workers", "0"], None),
        ("parquet", [*STREAMED, "--dataset", folder / "parquet", "--num_workers", "2"], None),
    ):
        code, output = run_script(
            EXAMPLE, *arguments, "--output_dir", name, cwd=tmp_path, setup=setup, processes=processes
        )
        assert code == 0, output
        runs[name] = tmp_path / name
    for name in ("tars", "parquet"):
        assert_equal(weights(runs[name]), weights(runs["disk"]))
        measured = [json.loads((runs[n] / "metrics.json").read_text())["AP"] for n in (name, "disk")]
        assert measured[0] == measured[1]


def ask_to_stop(at_step: int):
    record = TrainingRun.record_step

    def record_and_ask(run, *arguments):
        record(run, *arguments)
        if run.progress.step == at_step:
            os.kill(os.getpid(), signal.SIGTERM)

    TrainingRun.record_step = record_and_ask


def test_a_run_that_is_stopped_within_an_epoch_goes_on_exactly(folder, tmp_path):
    data = ["--dataset", folder / "tars", "--num_workers", "1"]
    code, output = run_script(EXAMPLE, *STREAMED, *data, "--output_dir", "whole", cwd=tmp_path)
    assert code == 0, output
    for step in (3, 14):  # within a block of the first epoch, and in the second epoch
        name = f"stopped-{step}"
        command = [EXAMPLE, *STREAMED, *data, "--output_dir", name]
        code, output = run_script(*command, cwd=tmp_path, setup=partial(ask_to_stop, step))
        assert code == 143, output
        code, output = run_script(*command, cwd=tmp_path)
        assert code == 0, output
        assert "Resumed after epoch" in output
        assert_equal(weights(tmp_path / name), weights(tmp_path / "whole"))


def test_a_run_does_not_go_on_with_another_buffer_or_other_shards(folder, tmp_path):
    command = [EXAMPLE, *STREAMED, "--dataset", folder / "tars", "--output_dir", "run", "--num_workers", "0"]
    code, output = run_script(*command, cwd=tmp_path, setup=partial(ask_to_stop, 3))
    assert code == 143, output
    resume = [EXAMPLE, "--output_dir", "run", "--resume"]
    code, output = run_script(*resume, "--shuffle_buffer", "12", cwd=tmp_path)
    assert code == 1
    assert "shuffle_buffer 8, now 12" in output
    code, output = run_script(*resume, "--dataset", folder / "parquet", cwd=tmp_path)
    assert code == 1
    assert "its training images have changed since" in output


def test_validation_images_can_be_a_file_on_this_machine(folder, tmp_path):
    val = folder / "drawn" / "annotations" / "instances_val.json"
    command = [EXAMPLE, *STREAMED, "--dataset", folder / "parquet", "--num_workers", "0", "--epochs", "1"]
    code, output = run_script(*command, "--val", val, "--output_dir", "run", cwd=tmp_path)
    assert code == 0, output
    assert f"{sum(COUNTS)} training and 6 validation images" in output


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--streaming"], "--streaming reads shards: name them with --dataset"),
        (["--streaming", "--dataset", "x", "--overfit", "3"], "--overfit needs the images on this machine"),
        (["--streaming", "--dataset", "x", "--masks"], "--masks needs the images on this machine"),
        (["--streaming", "--dataset", "x", "--train", "y"], "--train needs the images on this machine"),
        (["--streaming", "--dataset", "x", "--fold", "1/2"], "--fold needs the images on this machine"),
        (["--streaming", "--dataset", "x", "--images", "y"], "--images is only for those of --val FILE"),
        (["--streaming", "--dataset", "x", "--folds", "2", "--output_dir", "y"], "omit --streaming"),
        (["--shuffle_buffer", "9"], "--shuffle_buffer needs --streaming"),
        (["--streaming", "--dataset", "x", "--shuffle_buffer", "0"], "--shuffle_buffer must be at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, reason, capsys):
    with pytest.raises(SystemExit):
        parse_finetune_args("", given)
    assert reason in capsys.readouterr().err


def test_shards_on_the_hub_are_read_where_they_lie(folder, tmp_path):
    """The same epoch as from a folder, a connection that breaks included; of other splits nothing is transferred."""
    code = """
        import hashlib
        from hf_detr import DetrImageProcessor
        from hf_detr.data import *
        def digest(path):
            dataset = load_streamed_dataset(path, cache_dir={cache!r}, progress=False)
            collate = DetectionCollator(DetrImageProcessor(size={{"height": 32, "width": 32}}))
            loader = build_loader(AugmentedDataset(dataset, lambda row: row), collate, batch_size=8, training=True)
            content = [(b["pixel_values"].numpy().tobytes(), [label["boxes"].tolist() for label in b["labels"]]) for b in loader]
            print(len(dataset), hashlib.sha256(repr(content).encode()).hexdigest())
        digest({path!r})
        """  # noqa: E501
    with HubServer(users={"ann": "hf_ann"}) as server, HubClients(server, "import hf_detr, datasets") as clients:
        for kind in ("tars", "parquet"):
            files = {path.relative_to(folder / kind).as_posix(): path.read_bytes() for path in shards_in(folder / kind)}
            server.add_repo(f"datasets/ann/{kind}", files)
            there, here = (
                clients.run(code.format(path=path, cache=str(tmp_path / "cache")), tmp_path / "home", waits=False)
                for path in (f"ann/{kind}", str(folder / kind))
            )
            assert there == here
            assert there.startswith(f"{sum(COUNTS)} ")
            server.break_download(20_000)
            again = clients.run(
                code.format(path=f"ann/{kind}", cache=str(tmp_path / "new")), tmp_path / "home", waits=False
            )
            assert again == here
            before = len(server.requests)
            clients.run(
                f"""
                from hf_detr.data import load_streamed_dataset
                load_streamed_dataset("ann/{kind}", "val", keep_images=True, cache_dir={str(tmp_path / "val")!r})
                """,
                tmp_path / "home",
            )
            sent = sum(request.sent for request in server.requests[before:] if "/lfs/" in request.path)
            assert sent < sum(len(data) for name, data in files.items() if "train" in name)
        assert not server.errors


def shards_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]
