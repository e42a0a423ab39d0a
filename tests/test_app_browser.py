"""The page of `examples/app.py` in a browser: Debian's Chromium, driven by Playwright. Set HF_DETR_SCREENSHOTS to a
folder to keep pictures of all states, and HF_DETR_APP_MODEL to a checkpoint of the shapes to see it at work."""

import json
import os
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from conftest import save_tiny_checkpoint
from PIL import Image

from hf_detr.app import Viewer, serve_page

playwright_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("gradio_image_annotation")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
    pytest.mark.xdist_group("browser"),
]
WIDE, PHONE = {"width": 1280, "height": 1000}, {"width": 390, "height": 844}
PATIENCE = 60_000  # milliseconds


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    checkpoint = os.environ.get("HF_DETR_APP_MODEL") or save_tiny_checkpoint(
        folder / "model", {0: "rectangle", 1: "ellipse", 2: "triangle"}
    )
    viewer = Viewer(str(checkpoint), "cpu")
    examples = [folder / name for name in ("one.png", "two.png")]
    if "HF_DETR_APP_MODEL" in os.environ:
        from hf_detr.app import example_images

        examples = example_images(viewer, None, folder)
    else:
        for number, file in enumerate(examples):
            pixels = np.random.default_rng(number).integers(0, 255, (80, 120, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(file)
    page = serve_page(viewer, examples, folder / "corrections", 0.3, prevent_thread_lock=True, quiet=True)
    first = viewer.view(examples[0])
    box, (width, height) = first.detections[0]["box"], first.picture.size
    middle = (box["xmin"] + box["xmax"]) / 2 / width, (box["ymin"] + box["ymax"]) / 2 / height
    yield page.local_url, folder, middle
    page.close()


@pytest.fixture(scope="module")
def browser():
    with playwright_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@contextmanager
def visit(browser, url, viewport=WIDE, dark=False):
    """The page once the first example is shown. Errors in the browser's console and requests to other hosts fail."""
    context = browser.new_context(viewport=viewport, accept_downloads=True)
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    errors, foreign = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: foreign.append(request.url) if not _is_local(request.url, url) else None)
    page.goto(f"{url}?__theme={'dark' if dark else 'light'}")
    status_says(page, "pixels: ")
    yield page
    context.close()
    assert errors == []
    assert foreign == []


def _is_local(request, url):
    return request.startswith((url, "data:", "blob:", url.replace("127.0.0.1", "localhost")))


def status_says(page, text):
    playwright_api.expect(page.locator("#status")).to_contain_text(text, timeout=PATIENCE)


def keep(page, name):
    if "HF_DETR_SCREENSHOTS" in os.environ:
        page.wait_for_timeout(700)
        folder = Path(os.environ["HF_DETR_SCREENSHOTS"])
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=folder / f"{name}.png", full_page=True)


def set_threshold(page, value):
    number = page.locator("#threshold input[type=number]")
    number.fill(str(value))
    number.press("Enter")
    number.blur()
    status_says(page, f"above {value:.2f}")


def shown(page):
    """The number of detections above the threshold, as the page says; the table renders the rows in view only."""
    return int(re.search(r"(\d+) detections? above", page.locator("#status").inner_text())[1])


@pytest.mark.parametrize(("viewport", "dark"), [(WIDE, False), (WIDE, True), (PHONE, False), (PHONE, True)])
def test_the_first_example_is_shown_on_any_screen(served, browser, viewport, dark):
    with visit(browser, served[0], viewport, dark) as page:
        playwright_api.expect(page.locator("#picture img")).to_be_visible(timeout=PATIENCE)
        playwright_api.expect(page.locator("#examples img").nth(1)).to_be_visible(timeout=PATIENCE)
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= viewport["width"], "nothing is cut off, or needs a scroll to the side"
        keep(page, f"{'wide' if viewport is WIDE else 'phone'}-{'dark' if dark else 'light'}")


def test_the_threshold_changes_picture_table_and_downloads(served, browser):
    with visit(browser, served[0]) as page:
        set_threshold(page, 0.05)
        before, many = page.locator("#picture img").get_attribute("src"), shown(page)
        assert page.locator("#table tbody tr").count() >= 1
        set_threshold(page, 0.98)
        playwright_api.expect(page.locator("#picture img")).not_to_have_attribute("src", before)
        assert shown(page) < many
        set_threshold(page, 0.05)
        with page.expect_download() as download:
            page.locator("#coco").click()
        coco = json.loads(Path(download.value.path()).read_text())
        assert len(coco["annotations"]) == many
        with page.expect_download() as download:
            page.locator("#label-studio").click()
        [task] = json.loads(Path(download.value.path()).read_text())
        assert len(task["predictions"][0]["result"]) == many


def test_files_are_uploaded_and_bad_ones_are_explained(served, browser, tmp_path):
    good, bad = tmp_path / "mine.png", tmp_path / "broken.jpg"
    Image.new("RGB", (100, 60), "white").save(good)
    bad.write_bytes(b"\xff\xd8\xff no jpeg")
    with visit(browser, served[0]) as page:
        page.locator("#upload input[type=file]").set_input_files(good)
        status_says(page, "mine.png, 100 x 60 pixels")
        page.locator("#upload button[aria-label=Clear]").first.click()
        page.locator("#upload input[type=file]").set_input_files(bad)
        status_says(page, "broken.jpg cannot be read as an image")
        assert page.locator("#coco").is_disabled()
        keep(page, "bad-file")


def test_a_click_shows_where_the_query_looked_and_a_test_of_it(served, browser):
    with visit(browser, served[0]) as page:
        set_threshold(page, 0.05)
        page.locator("#table").get_by_text(re.compile("^(rectangle|ellipse|triangle)$")).locator(
            "visible=true"
        ).first.click()
        playwright_api.expect(page.locator("#hint")).to_contain_text("cross-attention")
        playwright_api.expect(page.locator("#why img")).to_be_visible(timeout=PATIENCE)
        keep(page, "why-box")
        page.locator("#test").click()
        playwright_api.expect(page.locator("#hint")).to_contain_text("faithfulness")
        playwright_api.expect(page.locator("#curves img")).to_be_visible(timeout=PATIENCE)
        keep(page, "why-test")
        page.get_by_text("the encoder's attention from a point").click()
        playwright_api.expect(page.locator("#why img")).to_have_count(0)
        image = page.locator("#picture img").bounding_box()
        page.locator("#picture img").click(position={"x": image["width"] / 3, "y": image["height"] / 2})
        playwright_api.expect(page.locator("#hint")).to_contain_text("Encoder self-attention")
        playwright_api.expect(page.locator("#why img")).to_be_visible(timeout=PATIENCE)
        keep(page, "point")


def test_boxes_are_corrected_and_saved_to_train_on(served, browser):
    url, folder, (across, down) = served
    with visit(browser, url) as page:
        set_threshold(page, 0.05)
        many = shown(page)
        page.get_by_role("tab", name="Correct and learn").click()
        page.locator("#correct").click()
        canvas = page.locator("#editor canvas")
        canvas.wait_for(state="visible")
        page.wait_for_timeout(1000)
        keep(page, "correct")
        page.locator("#save").click()
        playwright_api.expect(page.locator("#saved")).to_contain_text(re.compile(f"with {many} box"))
        playwright_api.expect(page.locator("#saved")).to_contain_text("hf-detr finetune --model")
        place = canvas.bounding_box()
        page.mouse.move(place["x"] + place["width"] * across, place["y"] + place["height"] * down)
        page.mouse.down()
        page.mouse.up()
        page.keyboard.press("Delete")
        page.locator("#save").click()
        playwright_api.expect(page.locator("#saved")).to_contain_text(
            re.compile(rf"with {many - 1} box(es)? \(its earlier boxes were replaced")
        )
        keep(page, "saved")
        playwright_api.expect(page.locator("#archive")).to_have_count(0)  # the folder is here
    coco = json.loads((folder / "corrections" / "annotations" / "instances_train.json").read_text())
    assert (len(coco["images"]), len(coco["annotations"])) == (1, many - 1)
