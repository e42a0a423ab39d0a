"""Training on images that stay in shards."""

import io
import json
import shutil
import tarfile
import time
from collections import Counter
from pathlib import Path
from threading import Event

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from script_runner import run_script
from shards import contents, write_parquet, write_webdataset

from hf_detr import DetrImageProcessor
from hf_detr.data import (
    AugmentedDataset,
    DetectionCollator,
    StreamedDataset,
    build_loader,
    draw_shapes_dataset,
    flip_rotate_augmentation,
    id2label,
    image_sizes,
    load_streamed_dataset,
)
from hf_detr.data.shard_source import ShardReader, ShardSource
from hf_detr.data.streaming import ImageFeed, ShardedBatches
from hf_detr.dataset_check import check_dataset

COUNTS = (7, 4, 1, 11)  # images in the shards of 23
EXAMPLES = Path(__file__).parents[1] / "examples"
KINDS = ("parquet", "parquet without sizes", "webdataset")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    draw_shapes_dataset(folder / "data", num_train=sum(COUNTS), num_val=5, progress=False)
    return folder / "data"


@pytest.fixture
def sharded(drawn, load, tmp_path):
    """Writes the drawn images as shards of a kind."""

    def write(kind: str, folder: Path | None = None, changed=lambda rows: None) -> Path:
        folder = folder or tmp_path / kind.replace(" ", "-")
        for split, counts in (("train", COUNTS), ("validation", (5,))):
            rows = contents(load(drawn, "train" if split == "train" else "val"))
            if split == "train":
                changed(rows)
            if kind == "webdataset":
                write_webdataset(folder, split, rows, counts)
            else:
                write_parquet(folder, split, rows, counts, sizes=kind == "parquet")
        return folder

    return write


@pytest.fixture
def stream(tmp_path):
    def load_anew(path, split="train", **options):
        return load_streamed_dataset(path, split, cache_dir=tmp_path / "cache", progress=False, **options)

    return load_anew


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_the_same_images_on_disk(kind, sharded, stream, load):
    folder = sharded(kind)
    streamed, whole = stream(folder), load(folder)
    assert isinstance(streamed, StreamedDataset)
    assert len(streamed) == len(whole) == sum(COUNTS)
    assert id2label(streamed) == id2label(whole)
    assert image_sizes(streamed) == image_sizes(whole)
    for index in (0, 6, 7, 11, 12, 22, -1):
        one, other = streamed[index], whole[index]
        assert one["objects"] == other["objects"]
        assert one["image_id"] == other["image_id"]
        assert one["image"].tobytes() == other["image"].convert(one["image"].mode).tobytes()
    assert [streamed.annotations[i]["shard"] for i in (6, 7, 10, 11, 12)] == [0, 1, 1, 2, 3]
    validation = stream(folder, "val", keep_images=True, id2label=id2label(streamed))
    assert [row["image"].size for row in validation] == [row["image"].size for row in load(folder, "val")]


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_image_is_in_one_batch_of_an_epoch(processes, grouped):
    places = np.array([(shard, row) for shard, count in enumerate((40, 3, 57, 21)) for row in range(count)])
    sizes = [(100, 50 + number % 90) for number in range(len(places))] if grouped else None
    epochs = []
    for epoch in (1, 2):
        parts = [
            ShardedBatches(places, sizes, 4, shuffle_buffer=16, num_processes=processes, process_index=index)
            for index in range(processes)
        ]
        for part in parts:
            part.set_epoch(epoch)
        own = [[batch for block in part.blocks() for batch in block] for part in parts]
        assert sorted(i for of_process in own for batch in of_process for i in batch) == list(range(len(places)))
        assert len({len(of_process) for of_process in own}) == 1
        assert own[0] == parts[-1].batches()[::processes]
        assert all(len(of_process) == len(part) for of_process, part in zip(own, parts, strict=True))
        epochs.append(own)
        # a process reads a part of the images in a row, and each block of its batches is a part of that in a row
        turn = {int(index): number for number, index in enumerate(parts[0].reading_order())}
        for part in parts:
            for block in part.blocks():
                turns = sorted(turn[index] for batch in block for index in batch)
                assert turns == list(range(turns[0], turns[0] + len(turns)))
        for part in parts:
            part.skip(3)
        rest = [[batch for block in part.blocks() for batch in block] for part in parts]
        assert rest == [of_process[3:] for of_process in own]
    assert epochs[0] != epochs[1]


def test_batches_are_those_of_the_same_images_on_disk_in_the_same_order(sharded, stream, load):
    """Bit by bit, whatever the number of workers; and from the middle of an epoch."""
    folder = sharded("webdataset")
    streamed, whole = stream(folder), load(folder)
    processor = DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96})

    def batches(dataset, workers, sampler=None, skip=0):
        augmented = AugmentedDataset(dataset, flip_rotate_augmentation(), seed=3)
        loader = build_loader(
            augmented, DetectionCollator(processor), batch_size=4, training=True, seed=3, num_workers=workers,
            accelerator=Accelerator(cpu=True), shuffle_buffer=8,
        )  # fmt: skip
        if sampler is not None:
            collate = DetectionCollator(processor)
            augmented.set_epoch(2)
            return [collate([augmented[index] for index in batch]) for batch in sampler]
        loader.set_epoch(2)
        loader.batch_sampler.skip(skip)
        return list(loader)

    planned = ShardedBatches(streamed.places(), image_sizes(whole), 4, shuffle_buffer=8, seed=3)
    planned.set_epoch(2)
    expected = batches(whole, 0, planned.batches())
    for workers, skip in ((0, 0), (2, 0), (0, 3), (1, 4)):
        found = batches(streamed, workers, skip=skip)
        assert len(found) == len(expected) - skip == 6 - skip
        for one, other in zip(found, expected[skip:], strict=True):
            assert torch.equal(one["pixel_values"], other["pixel_values"])
            for label, other_label in zip(one["labels"], other["labels"], strict=True):
                assert label.keys() == other_label.keys()
                assert all(torch.equal(label[name], other_label[name]) for name in label)


def test_a_loop_that_is_left_does_not_disturb_the_next_one(sharded, stream):
    streamed = stream(sharded("parquet"))
    loader = build_loader(
        AugmentedDataset(streamed, flip_rotate_augmentation()),
        DetectionCollator(DetrImageProcessor(size={"height": 32, "width": 32})),
        batch_size=2, training=True, shuffle_buffer=4,
    )  # fmt: skip
    for _ in range(5):
        next(iter(loader))
    seen = [int(label["image_id"]) for batch in loader for label in batch["labels"]]
    assert sorted(seen) == sorted(streamed["image_id"])


def test_images_that_are_shown_more_often_are_read_once_more(sharded, stream):
    streamed = stream(sharded("parquet")).select([0, 0, 5, 5, 5, 22])
    images = [image["bytes"] for image in streamed.read(range(6))]
    assert images[0] == images[1]
    assert images[2] == images[3] == images[4]
    assert len({images[0], images[2], images[5]}) == 3


def test_sizes_that_are_not_those_of_the_images_are_refused_where_they_are_read(sharded, stream):
    folder = sharded("parquet", changed=lambda rows: rows[8].update(width=rows[8]["width"] + 7))
    streamed = stream(folder)
    with pytest.raises(
        ValueError,
        match=r"8\.png \(row 1 of .*00001-of-00004\.parquet\) is recorded as 13\d x",
    ):
        streamed[8]


@pytest.mark.parametrize("kind", KINDS)
def test_few_invalid_boxes_are_dropped_and_many_refused(kind, sharded, stream, caplog):
    def one(rows):
        row = next(row for row in rows if row["objects"]["bbox"])
        row["objects"]["bbox"][0] = [5.0, 5.0, 0.0, 10.0]

    def many(rows):
        for row in rows:
            row["objects"]["bbox"] = [[5.0, 5.0, 0.0, 10.0] for _ in row["objects"]["bbox"]]

    streamed = stream(sharded(kind, changed=one))
    assert len(streamed) == sum(COUNTS)
    folder = sharded(kind, changed=many)
    with pytest.raises(ValueError, match="problems"):
        stream(folder)


def test_an_unreadable_image_is_named(sharded, stream):
    def damage(rows):
        rows[9]["image"]["bytes"] = rows[9]["image"]["bytes"][:-200]

    streamed = stream(sharded("parquet", changed=damage))
    with pytest.raises(
        ValueError, match=r"9\.png \(row 2 of .*00001-of-00004\.parquet\) cannot be read: .* Correct or"
    ):
        streamed[9]
    with pytest.raises(ValueError, match=r"cannot be opened|cannot identify"):
        stream(sharded("webdataset", changed=lambda rows: rows[9]["image"].update(bytes=b"no image")))


def test_shards_that_change_are_read_anew(sharded, stream, tmp_path):
    folder = sharded("webdataset")
    before = stream(folder)
    (folder / "train-0003.tar").unlink()
    assert len(stream(folder)) == sum(COUNTS[:3])
    shutil.copy(folder / "train-0002.tar", folder / "train-0001.tar")  # a run that has begun
    with pytest.raises(ValueError, match=r"train-0001\.tar has only 1 images now; its annotations were"):
        list(before.read(range(len(before) - 11)))


def test_what_is_not_in_shards_is_refused(drawn, load, stream, tmp_path):
    with pytest.raises(ValueError, match=r"holds no shards: .* omit --streaming"):
        stream(drawn)
    load(drawn).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="holds no shards"):
        stream(tmp_path / "saved")


def test_a_split_that_is_missing_is_named(sharded, stream):
    folder = sharded("parquet")
    with pytest.raises(FileNotFoundError, match=r'no split "test", only \[.train., .validation.\]'):
        stream(folder, "test")
    with pytest.raises(TypeError, match="validation are not streamed"):
        build_loader(stream(folder), list, batch_size=2, training=False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_doctor_finds_in_shards_what_it_finds_on_disk(kind, sharded, tmp_path):
    """And what only a look at the images shows: one that is cut off, copies, and sizes that are not theirs."""

    def plant(rows):
        rows[9]["image"]["bytes"] = rows[9]["image"]["bytes"][:-200]
        rows[20]["image"]["bytes"] = rows[3]["image"]["bytes"]
        rows[20]["width"], rows[20]["height"] = rows[3]["width"], rows[3]["height"]
        rows[5]["width"] += 3
        rows[14]["objects"]["bbox"] = [[5.0, 5.0, 0.0, 10.0]]
        rows[14]["objects"]["category"] = ["ellipse"]

    folder = sharded(kind, changed=plant)
    found = [
        Counter(finding.code for finding in check_dataset(folder, progress=False, streaming=streaming).findings)
        for streaming in (True, False)
    ]
    sizes = {"image-size-mismatch": 1} if kind == "parquet" else {}
    assert found[0] == found[1] + Counter(sizes)
    assert found[0]["image-truncated"] == found[0]["box-empty"] == found[0]["image-duplicate"] == 1


def test_the_doctor_shows_images_of_shards_and_writes_no_copy_of_them(sharded, tmp_path):
    empty = {"bbox": [[5.0, 5.0, 0.0, 10.0]], "category": ["ellipse"]}
    folder = sharded("webdataset", changed=lambda rows: rows[14].update(objects=empty))
    check = [EXAMPLES / "check_dataset.py", folder, "--streaming"]
    code, output = run_script(*check, "--report", "page.html", cwd=tmp_path)
    assert code == 1, output
    assert "a box has no area" in output
    assert (tmp_path / "page.html").read_text().count("<img") >= 1
    code, output = run_script(*check, "--fix", "out", cwd=tmp_path)
    assert code == 2
    assert "--fix copies images to this machine; omit --streaming" in output


def write_samples(folder, split, samples):
    """A WebDataset archive of (suffix of the image, content of the .json)."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / f"{split}-0.tar", "w") as tar:
        for number, (suffix, content) in enumerate(samples):
            file = io.BytesIO()
            PIL.Image.new("L", (40, 30), number * 20).save(file, "PNG" if suffix == "png" else "JPEG")
            parts = [(suffix, file.getvalue()), ("json", content.encode()), ("txt", b"a caption")]
            for ending, data in parts:
                if data:
                    member = tarfile.TarInfo(f"images/{number:03}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_json_of_an_archive_is_read_as_it_is(streaming, stream, load, tmp_path):
    """Types and keys that come late, other suffixes, an image without objects, ids and names, and a list."""
    whole = {"objects": [{"bbox": [1, 2, 10, 10], "category": "a"}]}
    late = {"objects": [{"bbox": [5.7, 5.5, 10.25, 9.5], "category": "b", "iscrowd": 1}], "image_id": 99}
    others = [{"annotations": late["objects"], "file_name": "z.jpg"}, late["objects"], {"objects": []}]
    samples = [("jpg", whole)] * 6 + [("png", late), *(("jpeg", other) for other in others)]
    folder = write_samples(tmp_path / "tars", "train", [(suffix, json.dumps(about)) for suffix, about in samples])
    rows = stream(folder) if streaming else load(folder)
    assert id2label(rows) == {0: "a", 1: "b"}
    assert [rows[index]["image"].getpixel((0, 0)) for index in (5, 6)] == [100, 120]
    found = [rows[index]["objects"] for index in range(10)]
    assert [len(objects["bbox"]) for objects in found] == [1] * 9 + [0]
    for objects in found[6:9]:
        assert (objects["bbox"], objects["iscrowd"], objects["category"]) == ([[5.7, 5.5, 10.25, 9.5]], [1], [1])
    assert rows[8 - 1]["file_name"] == "z.jpg"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"shapes": []}', r"1 \(001\.jpg\): its \.json has none of the keys objects, annotations"),
        ("{", r"1 \(001\.jpg\): .*"),
        ("", r"1 \(001\.jpg\): there is no \.json of this name"),
    ],
)
def test_a_sample_without_objects_is_named(content, reason, stream, tmp_path):
    good = json.dumps({"objects": [{"bbox": [1, 2, 10, 10], "category": "a"}]})
    folder = write_samples(tmp_path / "tars", "train", [("jpg", good), ("jpg", content)])
    with pytest.raises(ValueError, match=reason):
        stream(folder)


def test_names_of_samples_end_at_the_first_point(stream, tmp_path):
    """As in WebDataset: `000.seg.png` is another file of the sample, and a second image is told."""
    good = json.dumps({"objects": [{"bbox": [1, 2, 10, 10], "category": "a"}]})
    folder = write_samples(tmp_path / "tars", "train", [("jpg", good)] * 2)

    def add(name):
        with tarfile.open(folder / "train-0.tar", "a") as tar:
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))

    add("images/001.seg.png")
    assert [row["image"].size for row in map(stream(folder).__getitem__, range(2))] == [(40, 30)] * 2
    add("images/001.png")
    with pytest.raises(ValueError, match=r"two files for the image of images/001: images/001\.png is the second"):
        stream(folder)
    folder = write_samples(tmp_path / "other", "train", [("jpg", good), ("v2.jpg", good)])
    with pytest.raises(ValueError, match=r"there is no image of this name"):
        stream(folder)


def test_annotations_in_a_folder_come_before_archives_beside_them(drawn, load, tmp_path):
    folder = shutil.copytree(drawn, tmp_path / "data")
    write_samples(folder, "train", [("jpg", json.dumps({"shapes": []}))] * 2)
    assert len(load(folder)) == sum(COUNTS)


def test_arguments_of_datasets_belong_to_the_cached_annotations(sharded, stream):
    folder = sharded("parquet")
    assert len(stream(folder)) == sum(COUNTS)
    some = stream(folder, filters=[("image_id", ">=", 4)])
    assert len(some) < sum(COUNTS)
    assert [some[index]["image"].size for index in range(len(some))] == [(w, h) for h, w in image_sizes(some)]


def test_parquet_of_other_programs(sharded, stream, load):
    """Images as a plain struct or bytes, a second column of images with broken ones, and sizes that are no integers."""
    folder = sharded("parquet")
    expected = [row["image"].tobytes() for row in load(folder)]
    for file in sorted((folder / "data").glob("train*")):
        table = pq.read_table(file)
        broken = pa.array([{"bytes": b"no image", "path": None}] * len(table), table.schema.field("image").type)
        table = table.append_column("thumbnail", broken)
        index = table.schema.get_field_index("image")
        table = table.set_column(index, "image", pc.struct_field(table["image"], "bytes"))
        table = table.set_column(table.schema.get_field_index("width"), "width", table["width"].cast(pa.float64()))
        pq.write_table(table.replace_schema_metadata(None), file)
    streamed = stream(folder)
    assert [streamed[index]["image"].tobytes() for index in range(len(streamed))] == expected


def test_a_split_that_is_missing_is_told_before_others_are_read(sharded, stream, monkeypatch):
    folder = sharded("webdataset")
    next(folder.glob("validation*")).unlink()
    monkeypatch.setattr(ShardSource, "find", lambda *arguments: pytest.fail("the training images are read"))
    with pytest.raises(
        FileNotFoundError, match=r'no split "val".* name annotated images on this machine with --val FILE'
    ):
        stream(folder, needs=["val"])


def test_a_broken_connection_is_no_shorter_shard(sharded, stream):
    streamed = stream(sharded("webdataset"))
    rows, fail = streamed.reader.rows, [True]

    class Breaking:
        num_shards = rows.num_shards

        def shard(self, *arguments):
            for number, row in enumerate(rows.shard(*arguments)):
                if number == 3 and fail.pop():
                    fail.append(False)
                    raise ConnectionError("lost")
                yield row

    reader = ShardReader(Breaking())
    with pytest.raises(ConnectionError):
        list(streamed.read(range(6), reader))
    assert len(list(streamed.read(range(6), reader))) == 6


def test_an_epoch_that_is_left_stops_reading(sharded, stream):
    streamed = stream(sharded("parquet"))
    planned = ShardedBatches(streamed.places(), None, 2, shuffle_buffer=10)
    read, may_go_on = [], Event()

    class Slow(StreamedDataset):
        def read(self, indices, reader=None):
            for index, image in zip(indices, super().read(indices, reader), strict=True):
                if len(read) >= 10:  # the second block
                    may_go_on.wait(10)
                read.append(index)
                yield image

    feed = iter(ImageFeed(planned, Slow(streamed.annotations, streamed.reader)))
    next(feed)
    feed.close()
    may_go_on.set()
    time.sleep(0.5)
    assert len(read) <= 11


def cut(share):
    return lambda content: content[: int(len(content) * share)]


@pytest.mark.parametrize(
    "damage",
    [
        *(cut(share) for share in (0.1, 0.3, 0.5, 0.75, 0.9)),
        lambda content: content[: content.index(b"00000004.json")],  # at the header of a file
        lambda content: content.replace(content[content.index(b"00000004.jpg") :][:512], b"x" * 512),
        lambda content: b"<html>not found</html>" * 100,
        lambda content: b"",
    ],
    ids=["10 %", "30 %", "50 %", "75 %", "90 %", "at a header", "a header", "a page", "nothing"],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_an_archive_that_is_cut_off_or_damaged_is_named(damage, streaming, sharded, stream, load):
    folder = sharded("webdataset")
    file = folder / "train-0000.tar"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"train-0000\.tar is cut off or damaged.*Copy or write it again"):
        stream(folder) if streaming else load(folder)
    result = check_dataset(folder, streaming=True, progress=False)
    assert any("train-0000.tar is cut off or damaged" in str(finding) for finding in result.errors)


@pytest.mark.parametrize("shard", [0, 2])
def test_a_parquet_file_that_is_cut_off_is_an_error(shard, sharded, stream, load):
    folder = sharded("parquet")
    file = sorted((folder / "data").glob("train*"))[shard]
    file.write_bytes(file.read_bytes()[:-300])
    for read in (stream, load):
        with pytest.raises(ValueError, match=r"cannot be read|cut off or damaged"):
            read(folder)


def test_shards_with_paths_of_images_are_told(sharded, stream, tmp_path):
    folder = sharded(
        "parquet", changed=lambda rows: [row["image"].update(bytes=None, path="raw/a.jpg") for row in rows]
    )
    with pytest.raises(ValueError, match=r"only names raw/a\.jpg, and there is no such file\. Write shards with the"):
        stream(folder)[0]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("train.tar.gz", b"", r"unpack its \.tar\.gz files"),
        ("train.tar", b"", r"its \.tar files do not begin with an image"),
        ("a.jpg", b"", r"omit --streaming"),
    ],
)
def test_it_is_told_why_a_folder_has_no_shards(name, content, reason, stream, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        stream(tmp_path / "folder")
