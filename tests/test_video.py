"""Videos in `examples/predict.py` and `hf_detr.prediction`: results, kept properties, damaged files, and early ends."""

import json
import os
import signal
import sys
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from conftest import save_tiny_checkpoint
from predict_example import PredictExample
from transformers import pipeline

from hf_detr.prediction import VideoReader, load_frames, open_video_job
from hf_detr.prediction.video_writer import VideoWriter

av = pytest.importorskip("av")

RATE, TIME_BASE = Fraction(30000, 1001), Fraction(1, 90000)
STEP = 3003  # of TIME_BASE between two frames at RATE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"), {0: "cat", 1: "dog"})


def picture(width=96, height=64, seed=0):
    """Red, green and blue in three corners, noise in the fourth."""
    pixels = np.zeros((height, width, 3), np.uint8)
    middle, center = height // 2, width // 2
    pixels[:middle, :center], pixels[:middle, center:], pixels[middle:, :center] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    pixels[middle:, center:] = blocks.repeat(8, 0).repeat(8, 1)[: height - middle, : width - center]
    return pixels


def make_clip(path, size=(96, 64), frames=12, times=None, turned=None, audio=True, options=None):
    """`times` in units of TIME_BASE; `turned`: degrees and whether mirrored."""
    times = times or [index * STEP for index in range(frames)]
    with av.open(str(path), "w", options=options or {}) as out:
        video = out.add_stream("libx264", rate=RATE, options={"g": "4", "crf": "5"})
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        video.codec_context.time_base = TIME_BASE
        if turned:
            video.set_display_rotation(turned[0], hflip=turned[1])
        sound = out.add_stream("aac", rate=44100) if audio else None
        for index, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(*size, index), format="rgb24")
            frame.pts, frame.time_base = time, TIME_BASE
            out.mux(video.encode(frame))
            if sound is not None:
                wave = np.sin(np.arange(1470) / (5 + index)) * 9999
                samples = av.AudioFrame.from_ndarray(wave[None].astype(np.int16), format="s16", layout="mono")
                samples.sample_rate, samples.pts, samples.time_base = 44100, index * 1470, Fraction(1, 44100)
                out.mux(sound.encode(samples))
        for stream in filter(None, (video, sound)):
            out.mux(stream.encode())
    return path


def decode(path):
    """Times in seconds from the start of the file, and pixels, by PyAV alone."""
    with av.open(str(path)) as file:
        start = (file.start_time or 0) / 1e6
        frames = [(frame.time - start, frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
    return [time for time, _ in frames], [pixels for _, pixels in frames]


def sound_of(path):
    """(time in seconds from the start of the file, bytes) of each packet of audio."""
    with av.open(str(path)) as file:
        start = (file.start_time or 0) / 1e6
        packets = [packet for packet in file.demux(audio=0) if packet.size]
        return [(round(float(packet.pts * packet.time_base) - start, 4), bytes(packet)) for packet in packets]


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def predict(checkpoint):
    return PredictExample(checkpoint)


@pytest.fixture(scope="module")
def predicted(predict, tmp_path_factory):
    """A clip of 12 frames with sound, the output folder of its prediction, and what was printed."""
    folder = tmp_path_factory.mktemp("predicted")
    clip, out = make_clip(folder / "clip.mp4"), folder / "out"
    return clip, out, predict(clip, "--output_dir", out, "--batch_size", "5", "--num_workers", "2")


# -- results -----------------------------------------------------------------------------------------------------------


def test_records_are_what_the_pipeline_finds_in_each_frame(predicted, checkpoint):
    clip, out, text = predicted
    records, (times, frames) = records_of(out / "clip.jsonl"), decode(clip)
    assert [record["frame"] for record in records] == list(range(12))
    np.testing.assert_allclose([record["time"] for record in records], times, rtol=0, atol=1e-4)
    detector = pipeline("object-detection", model=str(checkpoint), device="cpu")
    for record, pixels in zip(records, frames, strict=True):
        expected = detector(pixels, threshold=0.25, round_boxes=False)
        assert [found["label"] for found in record["objects"]] == [found["label"] for found in expected]
        for found, wanted in zip(record["objects"], expected, strict=True):
            assert found["score"] == pytest.approx(wanted["score"], abs=1e-4)
            assert found["box"] == pytest.approx(wanted["box"], abs=1e-3)
    objects = sum(len(record["objects"]) for record in records)
    assert objects > 10
    assert f"{objects} objects in 12 frames" in text


def test_the_video_keeps_size_rate_times_and_sound(predicted):
    clip, out, _ = predicted
    made = out / "clip.mp4"
    times, frames = decode(made)
    np.testing.assert_allclose(times, decode(clip)[0], rtol=0, atol=1e-4)
    assert frames[0].shape == (64, 96, 3)
    assert sound_of(made) == sound_of(clip)
    with av.open(str(made)) as file:
        assert file.streams.video[0].average_rate == RATE
    assert sorted(path.name for path in made.parent.iterdir()) == [
        ".clip.lock", "clip.job.json", "clip.jsonl", "clip.mp4",
    ]  # fmt: skip


def test_times_of_a_variable_rate_are_kept(predict, tmp_path):
    times = [0, 3000, 4000, 20000, 20900, 60000, 90000, 180000]
    clip = make_clip(tmp_path / "phone.mov", times=times, audio=False)
    predict(clip, "--output_dir", tmp_path / "out", "--batch_size", "3")
    seconds = [time / 90000 for time in times]
    np.testing.assert_allclose(decode(tmp_path / "out" / "phone.mp4")[0], seconds, rtol=0, atol=1e-4)
    recorded = [record["time"] for record in records_of(tmp_path / "out" / "phone.jsonl")]
    np.testing.assert_allclose(recorded, seconds, rtol=0, atol=1e-4)


def test_tiles_find_more_objects(predict, predicted, tmp_path):
    clip, out, _ = predicted
    predict(clip, "--output_dir", tmp_path, "--tile", "48", "--batch_size", "2", "--no-pictures")
    tiled, plain = (records_of(folder / "clip.jsonl") for folder in (tmp_path, out))
    assert len(tiled) == len(plain) == 12
    assert sum(len(record["objects"]) for record in tiled) > sum(len(record["objects"]) for record in plain)


@pytest.mark.skipif(not hasattr(av.video.stream.VideoStream, "set_display_rotation"), reason="PyAV is too old")
@pytest.mark.parametrize("turned", [(0, True), (90, False), (90, True), (180, False), (270, False), (270, True)])
def test_a_turned_video_is_read_as_players_show_it(tmp_path, turned):
    clip = make_clip(tmp_path / "clip.mp4", frames=1, turned=turned, audio=False)
    expected = np.rot90(decode(clip)[1][0], turned[0] // 90)  # anticlockwise, then mirrored
    if turned[1]:
        expected = np.fliplr(expected)
    with VideoReader(clip) as reader:
        [frame] = reader
    np.testing.assert_array_equal(frame.pixels, expected)


def write_again(clip, path):
    """Copy all frames and the audio, and return the problems."""
    with VideoReader(clip) as reader:
        items = list(reader)
        first = next(item for item in items if hasattr(item, "pixels"))
        writer = VideoWriter(path, reader, *first.picture.size)
        for item in items:
            if hasattr(item, "pixels"):
                writer.write(item, item.picture)
        for item in items:
            if not hasattr(item, "pixels"):
                writer.copy_audio(item)
        writer.close()
        return [*reader.problems, *writer.problems]


def test_a_turned_video_is_written_upright(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", turned=(90, False))
    assert write_again(clip, tmp_path / "made.mp4") == []
    expected, found = (decode(path)[1] for path in (clip, tmp_path / "made.mp4"))
    assert found[0].shape == (96, 64, 3)
    assert np.abs(np.rot90(expected[5])[4:28, 4:-4].astype(int) - found[5][4:28, 4:-4]).mean() < 6


@pytest.mark.parametrize(("space", "full"), [(1, False), (2, False), (5, True), (6, False), (9, False)])
def test_colours_are_kept(tmp_path, space, full):
    """BT.709, unspecified, and others, in limited and full range."""
    with av.open(str(tmp_path / "clip.mp4"), "w") as out:
        video = out.add_stream("libx264", rate=25, options={"crf": "5"})
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        video.codec_context.colorspace, video.codec_context.color_range = space, 2 if full else 1
        for index in range(3):
            frame = av.VideoFrame.from_ndarray(picture(seed=index), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=space, dst_color_range="JPEG" if full else "MPEG")
            out.mux(video.encode(frame))
        out.mux(video.encode())
    assert write_again(tmp_path / "clip.mp4", tmp_path / "made.mp4") == []
    expected, found = (decode(path)[1][1].astype(int) for path in (tmp_path / "clip.mp4", tmp_path / "made.mp4"))
    for rows, columns, colour in ((slice(4, 28), slice(4, 44), "red"), (slice(36, 60), slice(4, 44), "blue")):
        assert np.abs(expected[rows, columns] - found[rows, columns]).mean() < 3, colour
    red = expected[4:28, 4:44].mean((0, 1))
    np.testing.assert_allclose(red, [255, 0, 0], atol=8)


@pytest.mark.parametrize("size", [(97, 64), (96, 63), (33, 33)])
def test_odd_sizes_are_kept(tmp_path, size):
    with av.open(str(tmp_path / "odd.mkv"), "w") as out:
        video = out.add_stream("ffv1", rate=25)
        video.width, video.height, video.pix_fmt = *size, "bgr0"
        for index in range(3):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture(*size, index), format="rgb24")))
        out.mux(video.encode())
    assert write_again(tmp_path / "odd.mkv", tmp_path / "made.mp4") == []
    assert [pixels.shape for pixels in decode(tmp_path / "made.mp4")[1]] == [(size[1], size[0], 3)] * 3


def test_a_stream_that_does_not_begin_at_zero_keeps_sound_and_frames_together(tmp_path):
    clip = make_clip(tmp_path / "clip.ts")
    assert write_again(clip, tmp_path / "made.mp4") == []
    apart = []
    for path in (clip, tmp_path / "made.mp4"):
        with av.open(str(path)) as file:
            first = {}
            for packet in file.demux(video=0, audio=0):
                if packet.size:
                    first.setdefault(packet.stream.type, float(packet.pts * packet.time_base))
        apart.append(first["video"] - first["audio"])
    assert apart[0] == pytest.approx(apart[1], abs=0.001)


def test_sound_that_mp4_does_not_support_is_dropped_and_reported(tmp_path):
    with av.open(str(tmp_path / "clip.mkv"), "w") as out:
        video, sound = out.add_stream("mpeg4", rate=25), out.add_stream("tta", rate=44100, layout="stereo")
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        for index in range(5):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture(seed=index), format="rgb24")))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 1764), np.int16), format="s16", layout="stereo")
            samples.sample_rate, samples.pts, samples.time_base = 44100, index * 1764, Fraction(1, 44100)
            out.mux(sound.encode(samples))
        for stream in (video, sound):
            out.mux(stream.encode())
    assert write_again(tmp_path / "clip.mkv", tmp_path / "made.mp4") == ["audio is dropped: MP4 does not support tta"]
    assert len(decode(tmp_path / "made.mp4")[1]) == 5


# -- damaged files -----------------------------------------------------------------------------------------------------


def test_a_truncated_video_is_predicted_to_its_end_and_reported(predict, tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", frames=40, audio=False, options={"movflags": "faststart"})
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) * 6 // 10])
    text = predict(clip, "--output_dir", tmp_path / "out", "--batch_size", "4")
    records = records_of(tmp_path / "out" / "clip.jsonl")
    assert 15 < len(records) < 35
    assert len(decode(tmp_path / "out" / "clip.mp4")[0]) == len(records)
    assert "of 40 frames" in text
    about = json.loads((tmp_path / "out" / "clip.job.json").read_text())
    assert any("it ends after" in problem for problem in about["result"]["problems"])


def test_a_video_that_cannot_be_read_is_an_error_after_the_others_are_done(predict, tmp_path):
    clip, broken = make_clip(tmp_path / "clip.mp4", frames=3, audio=False), tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"broken.mp4 cannot be read as a video"):
        predict(broken, clip, "--output_dir", tmp_path / "out")
    assert len(records_of(tmp_path / "out" / "clip.jsonl")) == 3
    with pytest.raises(ValueError, match=r"clip.mp4 was drawn by predict.py"):
        predict(tmp_path / "out" / "clip.mp4", "--output_dir", tmp_path / "more")
    (tmp_path / "other").mkdir()
    same = clip.rename(tmp_path / "other" / "broken.mp4")
    with pytest.raises(ValueError, match="Two of the videos have the same name"):
        predict(broken, same)


def test_the_end_of_a_truncated_matroska_is_reported(tmp_path):
    clip = make_clip(tmp_path / "clip.mkv", frames=60, audio=False)
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) // 2])
    with VideoReader(clip) as reader:
        frames = list(reader)
    assert 15 < len(frames) < 45
    assert any("of 2.0 seconds" in problem for problem in reader.problems)


def test_damaged_frames_are_counted_and_later_ones_read(tmp_path):
    clip = make_clip(tmp_path / "clip.mp4", frames=40, audio=False, options={"movflags": "faststart"})
    content = bytearray(clip.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(255 for _ in range(3000))
    clip.write_bytes(content)
    with VideoReader(clip) as reader:
        frames = list(reader)
    assert frames[-1].time > 35 / RATE
    assert any("are damaged" in problem for problem in reader.problems)
    assert all(a.pts < b.pts for a, b in pairwise(frames))


def test_a_file_that_is_not_a_video_is_refused_and_nothing_written(predict, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(b"no video at all" * 100)
    with pytest.raises((OSError, ValueError), match=r"clip.mp4 cannot be read as a video"):
        predict(tmp_path / "clip.mp4", "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match=r"nowhere\.mp4 does not exist"):
        VideoReader(tmp_path / "nowhere.mp4")


# -- early ends, and outputs of other jobs -----------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_stopped_job_leaves_no_video_and_resumes_after_its_records(predict, predicted, tmp_path, monkeypatch):
    (clip, reference, _), out = predicted, tmp_path / "out"
    module, drawn = predict.module, []
    draw, detect = module.draw_detections, module.predict_batch

    def draw_and_stop(image, *arguments):
        drawn.append(image)
        if len(drawn) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(image, *arguments)

    monkeypatch.setattr(module, "draw_detections", draw_and_stop)
    try:
        predict(clip, "--output_dir", out, "--batch_size", "2")
    except SystemExit as end:
        code = end.code  # not `end` itself, whose traceback would keep the lock of the job
    assert code == 143
    assert not (out / "clip.mp4").exists()
    assert not (out / "clip.mp4.partial").exists()
    partial = out / "clip.jsonl.partial"
    assert len(records_of(partial)) == 8
    partial.write_text(partial.read_text()[:-20])  # as after a kill
    (out / "clip.mp4.partial").write_bytes(b"half a video")
    predicted_frames = []

    def record(detector, batch, *arguments, **options):
        predicted_frames.extend(image.image_id for image in batch)
        return detect(detector, batch, *arguments, **options)

    monkeypatch.setattr(module, "predict_batch", record)
    predict(clip, "--output_dir", out, "--batch_size", "3")
    assert predicted_frames == list(range(7, 12))
    ours, theirs = (records_of(path / "clip.jsonl") for path in (out, reference))
    for a, b in zip(ours, theirs, strict=True):
        assert (a["frame"], a["time"]) == (b["frame"], b["time"])
        assert [x["label"] for x in a["objects"]] == [x["label"] for x in b["objects"]]
    assert len(decode(out / "clip.mp4")[0]) == 12
    assert sound_of(out / "clip.mp4") == sound_of(clip)
    assert not list(out.glob("*.partial"))


def test_outputs_of_another_job_are_never_overwritten(predict, predicted):
    clip, out, _ = predicted
    before = clip.read_bytes()
    with pytest.raises(ValueError, match=r"clip.mp4 already exists but does not belong to .* Use another --output_dir"):
        open_video_job(clip.parent, clip, {})
    assert clip.read_bytes() == before
    made = {path: path.stat().st_mtime_ns for path in out.glob("clip*")}
    assert "Already done" in predict(clip, "--output_dir", out, "--batch_size", "2")
    differences = "threshold was 0.25 and is 0.3; dtype was 'float32' and is 'bfloat16'; tile was None and is 32"
    with pytest.raises(ValueError, match=differences):
        predict(clip, "--output_dir", out, "--threshold", "0.3", "--dtype", "bfloat16", "--tile", "32")
    assert {path: path.stat().st_mtime_ns for path in out.glob("clip*")} == made


def test_without_pictures_only_records_are_written(predict, tmp_path):
    predict(make_clip(tmp_path / "clip.mp4", frames=2), "--output_dir", tmp_path / "out", "--no-pictures")
    assert sorted(path.name for path in (tmp_path / "out").glob("clip*")) == ["clip.job.json", "clip.jsonl"]


def test_several_processes_are_refused(predict, monkeypatch, tmp_path):
    two = type("Two", (), {"num_processes": 2, "is_main_process": False})
    monkeypatch.setattr(predict.module, "Accelerator", two)
    (tmp_path / "clip.mp4").touch()
    with pytest.raises(SystemExit, match="by one process"):
        predict(tmp_path / "clip.mp4")


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r'pip install "hf_detr\[video\]"'):
        VideoReader(tmp_path / "clip.mp4")


@pytest.mark.parametrize("num_workers", [0, 3])
def test_few_frames_are_in_memory(checkpoint, tmp_path, monkeypatch, num_workers):
    detector = pipeline("object-detection", model=str(checkpoint), device="cpu")
    made = []
    frame = VideoReader._frame
    monkeypatch.setattr(VideoReader, "_frame", lambda self, *given: made.append(given[0]) or frame(self, *given))
    with VideoReader(make_clip(tmp_path / "clip.mp4", frames=16)) as reader:
        assert reader.num_frames == 16
        for number, batch in enumerate(load_frames(detector, reader, batch_size=2, num_workers=num_workers), start=1):
            assert [image.image_id for image in batch.images] == [item.index for item in batch.frames]
            assert len(made) <= 2 * (number + (2 if num_workers else 0))
    assert made == list(range(16))
