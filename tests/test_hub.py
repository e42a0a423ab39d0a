"""Pushed to a Hub and pulled from it, by the unmodified client, in processes of their own (see hub_server.py)."""

import io
import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import save_v4, their_model
from conftest import tiny_model, tiny_segmentation
from hub_client import ClientError, HubClients
from hub_server import INITIAL_FILES, HubServer
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

import hf_detr
from hf_detr import DetrForDetection, DetrImageProcessor
from hf_detr.evaluation import METRICS
from hf_detr.hub import build_model_card, hash_of_weights, model_card_of
from hf_detr.hub.endpoint import MARKER
from hf_detr.hub.model_card import BLANK, may_replace, read_metrics

pytestmark = pytest.mark.xdist_group("hub")  # its fixtures are expensive: one worker runs them once

LABELS = {0: "cat", 1: "dog", 2: "bird"}
ROOT = Path(__file__).parents[1]
# what travels with a model without masks
OTHERS = {"__init__.py", "segmentation.py", "mask_head.py"}  # not of a model of boxes
CODE = {path.name for path in (ROOT / "src" / "hf_detr" / "model").glob("*.py")} - OTHERS
IMPORTS = """
import runpy, torch, hf_detr, hf_detr.data, hf_detr.evaluation, hf_detr.hub, hf_detr.interop, hf_detr.training
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline
"""


@pytest.fixture(scope="module")
def running_server():
    with HubServer() as server:
        yield server


@pytest.fixture
def server(running_server):
    running_server.reset({"ann": "hf_ann", "bob": "hf_bob"})
    yield running_server
    assert running_server.errors == []


@pytest.fixture(scope="module")
def clients(running_server):
    with HubClients(running_server, IMPORTS) as clients:
        yield clients


@pytest.fixture(scope="module")
def saved_run(tmp_path_factory) -> Path:
    """A run's folder: model, processor, results that belong to the weights, settings and a picture."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    model = tiny_model(id2label=LABELS, label2id={name: index for index, name in LABELS.items()})
    model.save_pretrained(folder)
    DetrImageProcessor(size={"height": 64, "width": 96}).save_pretrained(folder)
    metrics = {name: 0.4 + index / 1000 for index, name in enumerate(METRICS)} | {"APl": -1.0}
    metrics |= {"per_class": {"cat": 0.5, "dog": 0.3004, "bird": -1.0}, "epoch": 7, "dataset": "pets", "split": "val"}
    metrics |= {"num_images": 123, "weights": hash_of_weights(folder)}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "args.json").write_text(
        json.dumps(
            {"model": "/secret/place", "dataset": "/secret/place", "backbone_weights": "/secret/place", "seed": 0}
            | {"base_model": "facebook/detr-resnet-50", "learning_rate": 1e-4, "output_dir": "/secret/place"}
        )
    )
    (folder / "validation.png").write_bytes(b"\x89PNG not looked at")
    return folder


@pytest.fixture
def checkpoint(saved_run, tmp_path) -> Path:
    return Path(shutil.copytree(saved_run, tmp_path / "run"))


def expected_outputs(folder: Path) -> dict[str, list]:
    torch.manual_seed(3)
    images = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        outputs = DetrForDetection.from_pretrained(folder)(images)
    return {"images": images, "logits": outputs.logits, "pred_boxes": outputs.pred_boxes}


PUSH_FOLDER = "import sys; from hf_detr.hub import push_folder; print(push_folder({!r}, 'ann/pets', {}))"


# -- the model and the processor's own methods ---------------------------------------------------------------------


def test_models_and_processors_push_with_the_arguments_of_transformers(checkpoint, server, clients, tmp_path):
    code = f"""
    from hf_detr import DetrForDetection, DetrImageProcessor
    model = DetrForDetection.from_pretrained({str(checkpoint)!r})
    processor = DetrImageProcessor.from_pretrained({str(checkpoint)!r})
    processor.push_to_hub("ann/pets", private=True, commit_message="The processor", token="hf_ann")
    model.push_to_hub("ann/pets", commit_message="The model", token="hf_ann")
    model.push_to_hub("ann/pets", revision="sharded", max_shard_size="500KB", token="hf_ann")
    model.config.num_labels
    model.class_labels_classifier.bias.data += 1
    print(model.push_to_hub("ann/pets", create_pr=True, token="hf_ann").pr_url)
    """
    link = clients.run(code, tmp_path / "home")
    repo = server.repos["ann/pets"]
    assert repo.private
    assert [commit.title for commit in repo.at("main").history()][:2] == ["The model", "The processor"]
    main = server.blobs_of("ann/pets")
    assert main.keys() - INITIAL_FILES.keys() == CODE | {
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    }  # fmt: skip
    assert main["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert sum(name.startswith("model-0000") for name in server.blobs_of("ann/pets", "sharded")) > 2
    assert "refs/pr/1" in link or "discussions/1" in link
    assert server.blobs_of("ann/pets", "refs/pr/1")["model.safetensors"] != main["model.safetensors"]
    card = main["README.md"].decode()
    assert "have not been evaluated" in card
    assert "cat, dog, bird" in card
    assert "[More Information Needed]" not in card


# -- without the package ---------------------------------------------------------------------------------------------

WITHOUT_PACKAGE = """
import sys
sys.modules["hf_detr"] = None  # importing it raises ImportError
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForObjectDetection, pipeline

wanted = torch.load({expected!r}, weights_only=True)
model = AutoModelForObjectDetection.from_pretrained("ann/pets", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
with torch.no_grad():
    outputs = model(wanted["images"])
for name in ("logits", "pred_boxes"):  # to rounding: the processes may have different numbers of threads
    assert torch.allclose(outputs[name], wanted[name], atol=1e-6), name
processor = AutoImageProcessor.from_pretrained("ann/pets", trust_remote_code=True)
assert processor(Image.new("RGB", (300, 200)), return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 96)
detector = pipeline("object-detection", model="ann/pets", trust_remote_code=True)
found = detector(Image.new("RGB", (300, 200), "red"), threshold=0.0)
assert found and all(set(box) == {{"score", "label", "box"}} for box in found)
assert {{box["label"] for box in found}} <= {{"cat", "dog", "bird"}}
assert all(0 <= b["box"]["xmin"] <= b["box"]["xmax"] <= 300 and b["box"]["ymax"] <= 200 for b in found)
labels = [{{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}}]
model.train()(wanted["images"][:1], labels=labels).loss.backward()  # it trains, too
model.save_pretrained({again!r})
again = AutoModelForObjectDetection.from_pretrained({again!r}, trust_remote_code=True)
assert torch.equal(again.class_labels_classifier.weight, model.class_labels_classifier.weight)
model.push_to_hub("ann/again")

def error_of(function, *args):
    try:
        function(*args)
    except ValueError as error:
        return str(error)

for error, name in (
    (error_of(type(model).from_pretrained, {foreign!r}), '"detr" checkpoint'),
    (error_of(type(model.config).from_pretrained, {foreign!r}), '"detr" checkpoint'),
    (error_of(type(processor).from_pretrained, {foreign!r}), "DetrFeatureExtractor"),
):
    assert "reads only hf_detr checkpoints; `pip install hf_detr` to read" in error and name in error, error
print("works")
"""


def test_pushed_models_work_where_hf_detr_cannot_be_imported(checkpoint, server, clients, tmp_path):
    clients.run(PUSH_FOLDER.format(str(checkpoint), ""), tmp_path / "home", token="hf_ann")
    torch.save(expected_outputs(checkpoint), tmp_path / "expected.pt")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "detr", "backbone": "resnet18"}')
    (tmp_path / "foreign" / "preprocessor_config.json").write_text('{"feature_extractor_type": "DetrFeatureExtractor"}')
    folders = {name: str(tmp_path / name) for name in ("again", "foreign")}
    code = WITHOUT_PACKAGE.format(expected=str(tmp_path / "expected.pt"), **folders)
    assert clients.run(code, tmp_path / "other", token="hf_ann", cold=True).strip().endswith("works")
    assert {path.name for path in (tmp_path / "again").glob("*.py")} < CODE, "the model's files, once more"
    assert "model.safetensors" in server.blobs_of("ann/again")


def test_with_the_package_its_own_code_is_used_and_no_trust_is_asked_for(checkpoint, server, clients, tmp_path):
    clients.run(PUSH_FOLDER.format(str(checkpoint), ""), tmp_path / "home", token="hf_ann")
    code = """
    import hf_detr
    from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline
    detector = pipeline("object-detection", model="ann/pets")
    assert type(detector) is hf_detr.DetrDetectionPipeline, type(detector)
    assert type(detector.model) is hf_detr.DetrForDetection
    assert type(AutoImageProcessor.from_pretrained("ann/pets")) is hf_detr.DetrImageProcessor
    model = AutoModelForObjectDetection.from_pretrained("ann/pets", trust_remote_code=True)
    assert type(model) is hf_detr.DetrForDetection
    print("local")
    """
    assert clients.run(code, tmp_path / "other").strip() == "local"


# -- an Inference Endpoint: the toolkit imports handler.py of the repository, and calls it -----------------------------

ENDPOINT = """
import sys
sys.modules["hf_detr"] = None  # importing it raises ImportError
import base64, io
import huggingface_hub, torch
from PIL import Image
from transformers import pipeline

folder = huggingface_hub.snapshot_download("ann/pets")
sys.path.insert(0, folder)
from handler import EndpointHandler

endpoint = EndpointHandler(folder)
image = Image.effect_noise((90, 60), 80).convert("RGB")
with io.BytesIO() as file:
    image.save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
wanted = pipeline({task!r}, model="ann/pets", trust_remote_code=True)(image, threshold=0.0)
assert wanted
assert endpoint({{"inputs": image, "parameters": {{"threshold": 0.0}}}}) == wanted
assert endpoint({{"inputs": encoded, "parameters": {{"threshold": 0.0}}}}) == wanted
assert endpoint({{"inputs": [image, encoded], "parameters": {{"threshold": 0.0}}}}) == [wanted, wanted]
assert endpoint({{"inputs": image, "parameters": {{"threshold": 1.0}}}}) == []
for request, sentence in (
    ({{}}, "no image in `inputs`"),
    ({{"inputs": []}}, "no image in `inputs`"),
    ({{"inputs": image, "parameters": {{"treshold": 0.5}}}}, "Unknown parameters: treshold. Known: threshold"),
    ({{"inputs": "not an image"}}, "The request cannot be processed"),
    ({{"inputs": 3}}, "The request cannot be processed"),
):
    answer = endpoint(request)
    assert set(answer) == {{"error"}} and sentence in answer["error"], answer
print("works")
"""


@pytest.mark.parametrize(
    ("build", "task"), [(tiny_model, "object-detection"), (tiny_segmentation, "image-segmentation")]
)
def test_a_pushed_model_serves_itself_as_an_endpoint(build, task, server, clients, tmp_path):
    build(id2label=LABELS, label2id={name: index for index, name in LABELS.items()}).save_pretrained(tmp_path / "model")
    DetrImageProcessor(size={"height": 64, "width": 96}).save_pretrained(tmp_path / "model")
    clients.run(PUSH_FOLDER.format(str(tmp_path / "model"), ""), tmp_path / "home", token="hf_ann")
    requirements = server.blobs_of("ann/pets")["requirements.txt"].decode()
    assert "hf_detr" not in requirements.partition("\n")[2], "it is not on the machine"
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {line for line in requirements.splitlines()[1:] if ">=" in line} <= set(ours)
    answer = clients.run(ENDPOINT.format(task=task), tmp_path / "other", token="hf_ann", cold=True)
    assert answer.strip().endswith("works")


def test_an_edited_handler_is_left_alone_and_a_generated_one_is_renewed(checkpoint, server, clients, tmp_path):
    server.add_repo("ann/pets", {"handler.py": b"mine", "requirements.txt": f"# {MARKER}\nold".encode()})
    clients.run(PUSH_FOLDER.format(str(checkpoint), ""), tmp_path / "home", token="hf_ann")
    pushed = server.blobs_of("ann/pets")
    assert pushed["handler.py"] == b"mine"
    assert b"timm" in pushed["requirements.txt"]


# -- push_folder and examples/push_to_hub.py -------------------------------------------------------------------------


def test_a_folder_is_pushed_in_one_commit_and_then_only_what_changed_travels(checkpoint, server, clients, tmp_path):
    script = f"""
    import runpy, sys
    sys.argv = ["push_to_hub.py", {str(checkpoint)!r}, "ann/pets", "--license", "mit", "--commit_message", "One"]
    runpy.run_path({str(ROOT / "examples" / "push_to_hub.py")!r}, run_name="__main__")
    """
    assert "/commit/" in clients.run(script, tmp_path / "home", token="hf_ann")
    assert len(server.commits_of("ann/pets")) == 2, "the Hub's own first commit, and ours"
    first = server.blobs_of("ann/pets")
    assert {"README.md", "metrics.json", "validation.png", "preprocessor_config.json"} <= first.keys()
    assert "args.json" not in first, "paths of this machine stay here"
    assert b"/secret/place" not in first["README.md"]
    assert json.loads(first["metrics.json"])["weights"] == hash_of_weights(checkpoint)

    sent = len(server.requests)
    DetrImageProcessor(size={"height": 128, "width": 128}).save_pretrained(checkpoint)
    clients.run(script, tmp_path / "home", token="hf_ann")
    second = server.blobs_of("ann/pets")
    assert {name for name in second if second[name] != first.get(name)} == {"preprocessor_config.json", "README.md"}
    uploads = [r for r in server.requests[sent:] if r.method == "PUT"]
    assert uploads == [], "no weights travel again"
    assert sum(r.received for r in server.requests[sent:]) < 60_000 < len(first["model.safetensors"])


def test_shards_of_an_earlier_push_do_not_stay_behind(checkpoint, server, clients, tmp_path):
    push = PUSH_FOLDER.format(str(checkpoint), "max_shard_size='500KB'")
    push += "; " + PUSH_FOLDER.format(str(checkpoint), "").partition("; ")[2]
    clients.run(push, tmp_path / "home", token="hf_ann")
    weights = [name for name in server.blobs_of("ann/pets") if "safetensors" in name]
    assert weights == ["model.safetensors"]
    assert len([n for n in server.repos["ann/pets"].at(server.commits_of("ann/pets")[1]).files if "model-0" in n]) > 2


def test_other_files_of_the_repository_stay_and_the_numbers_stay_with_their_weights(
    checkpoint, server, clients, tmp_path
):
    neighbours = dict.fromkeys(
        ("training_args.bin", "onnx/model.safetensors", "adapter_model.safetensors", "x.bin"), b"mine"
    )
    server.add_repo("ann/pets", neighbours | {"pytorch_model.bin": b"old weights"})
    clients.run(PUSH_FOLDER.format(str(checkpoint), "max_shard_size='500KB'"), tmp_path / "home", token="hf_ann")
    pushed = server.blobs_of("ann/pets")
    assert neighbours.items() <= pushed.items()
    assert "pytorch_model.bin" not in pushed
    for name, data in pushed.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(data)
    (tmp_path / "pulled" / "adapter_model.safetensors").unlink()
    assert read_metrics(tmp_path / "pulled")["AP"] == 0.4


def test_a_card_that_could_not_be_looked_at_is_not_overwritten(checkpoint, server, clients, tmp_path):
    server.add_repo("ann/pets", {"README.md": b"Mine.\n" + b"x" * 5000})
    push = """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError
    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("the Hub cannot be reached")
    HfApi.hf_hub_download = unreachable
    """ + PUSH_FOLDER.format(str(checkpoint), "")
    with pytest.raises(ClientError, match="the Hub cannot be reached"):
        clients.run(push, tmp_path / "home", token="hf_ann")
    assert server.blobs_of("ann/pets")["README.md"].startswith(b"Mine.")


def test_a_half_filled_card_is_somebody_s_work():
    assert not may_replace("---\ntags: []\n---\n# Mine\nTen paragraphs.\n## Bias\n[More Information Needed]\n")
    blank = ModelCard.from_template(ModelCardData(tags=["x"]), model_description=BLANK)
    assert may_replace(str(blank))
    assert not may_replace(str(blank).replace("## Uses", "Made in my garden.\n## Uses", 1))


def test_an_edited_card_is_left_alone_and_a_generated_one_is_renewed(checkpoint, server, clients, tmp_path):
    server.add_repo("ann/pets", {"README.md": b"---\nlicense: mit\n---\nMy own words.\n"})
    clients.run(PUSH_FOLDER.format(str(checkpoint), ""), tmp_path / "home", token="hf_ann")
    assert server.blobs_of("ann/pets")["README.md"] == b"---\nlicense: mit\n---\nMy own words.\n"
    model_push = f"""
    from hf_detr import DetrForDetection
    model = DetrForDetection.from_pretrained({str(checkpoint)!r})
    model.push_to_hub("ann/pets")
    model.push_to_hub("ann/other", tags=["garden"])
    """
    clients.run(model_push, tmp_path / "home", token="hf_ann")
    assert b"My own words." in server.blobs_of("ann/pets")["README.md"]
    assert b"have not been evaluated" in server.blobs_of("ann/other")["README.md"]
    assert "garden" in ModelCard(server.blobs_of("ann/other")["README.md"].decode()).data.tags


def test_a_folder_without_all_weights_is_not_pushed(checkpoint, server, clients, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.decoder.layernorm.weight"]
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    with pytest.raises(ClientError, match=r"has no weights for \['model.decoder.layernorm.weight'\]"):
        clients.run(PUSH_FOLDER.format(str(checkpoint), ""), tmp_path / "home", token="hf_ann")
    assert "ann/pets" not in server.repos


def test_an_upload_that_breaks_leaves_nothing_half_visible_and_can_be_repeated(checkpoint, server, clients, tmp_path):
    push = PUSH_FOLDER.format(str(checkpoint), "")
    clients.run(push, tmp_path / "home", token="hf_ann")
    before, commits = server.blobs_of("ann/pets"), server.commits_of("ann/pets")
    model = DetrForDetection.from_pretrained(checkpoint)
    model.class_labels_classifier.bias.data += 1
    model.save_pretrained(checkpoint)

    server.break_upload(after_bytes=100_000, times=50)
    with pytest.raises(ClientError, match="Error while uploading"):
        clients.run(push, tmp_path / "home", token="hf_ann", waits=False)
    server.mend()
    server.break_commit()
    with pytest.raises(ClientError, match="500"):
        clients.run(push, tmp_path / "home", token="hf_ann")
    assert server.blobs_of("ann/pets") == before
    assert server.commits_of("ann/pets") == commits
    clients.run(push, tmp_path / "home", token="hf_ann")
    after = server.blobs_of("ann/pets")
    assert after["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    assert b"have not been evaluated" in after["README.md"], "the numbers belong to the old weights"
    assert "metrics.json" not in after or after["metrics.json"] == before["metrics.json"]


# -- pulling ---------------------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_pulls_are_by_branch_by_commit_and_offline_from_the_cache(checkpoint, server, clients, tmp_path):
    server.add_repo("ann/pets", files_of(checkpoint))
    old = server.commits_of("ann/pets")[0]
    changed = DetrForDetection.from_pretrained(checkpoint)
    changed.class_labels_classifier.bias.data += 1
    changed.save_pretrained(checkpoint)
    clients.run(PUSH_FOLDER.format(str(checkpoint), ""), tmp_path / "pusher", token="hf_ann")
    bias = "print(DetrForDetection.from_pretrained('ann/pets'{}).class_labels_classifier.bias.sum().item())"
    load = "from hf_detr import DetrForDetection, DetrImageProcessor\n"
    both = load + bias.format("") + "\n" + bias.format(f", revision={old!r}")
    new_sum, old_sum = map(float, clients.run(both, tmp_path / "home").split())
    assert new_sum - old_sum == pytest.approx(4, abs=1e-4)
    online = len(server.requests)
    without_cache = f"""
try:
    DetrForDetection.from_pretrained("ann/pets", cache_dir={str(tmp_path / "cold")!r})
except OSError as error:
    print(" ".join(str(error).split()))
"""
    offline = clients.run(both + without_cache, tmp_path / "home", offline=True).splitlines()
    assert list(map(float, offline[:2])) == [new_sum, old_sum]
    assert len(server.requests) == online
    assert re.search(r"couldn't find them in the cached files.*offline", offline[2])


def test_a_private_model_is_refused_without_a_token_and_says_why(checkpoint, server, clients, tmp_path):
    server.add_repo("ann/pets", files_of(checkpoint), private=True)
    load = "from hf_detr import DetrForDetection; DetrForDetection.from_pretrained('ann/pets'); print('loaded')"
    for token in (None, "hf_bob"):
        with pytest.raises(ClientError, match=r"(?s)ann/pets is not a local folder.*private.*token"):
            clients.run(load, tmp_path / "home", token=token)
    assert clients.run(load, tmp_path / "home", token="hf_ann").strip() == "loaded"
    with pytest.raises(ClientError, match=r"403.*rights"):
        clients.run(PUSH_FOLDER.format(str(checkpoint), ""), tmp_path / "home", token="hf_bob")


def test_a_download_that_breaks_is_taken_up_again(checkpoint, server, clients, tmp_path):
    server.add_repo("ann/pets", files_of(checkpoint))
    server.break_download(after_bytes=200_000)
    load = "from hf_detr import DetrForDetection; "
    load += "print(DetrForDetection.from_pretrained('ann/pets').num_parameters())"
    parameters = sum(p.numel() for p in DetrForDetection.from_pretrained(checkpoint).parameters())
    assert clients.run(load, tmp_path / "home", waits=False).strip() == str(parameters)
    downloads = [r for r in server.requests if r.method == "GET" and r.sent >= 200_000]
    assert [r.sent for r in downloads] == [200_000, (checkpoint / "model.safetensors").stat().st_size]


def test_a_published_checkpoint_is_pulled_and_fine_tuned_from(server, clients, tmp_path):
    theirs = their_model("resnet18", num_labels=3, id2label=LABELS, label2id={n: i for i, n in LABELS.items()})
    save_v4(theirs, tmp_path / "theirs", pickle=True)
    (tmp_path / "theirs" / "preprocessor_config.json").write_text(
        json.dumps({"feature_extractor_type": "DetrFeatureExtractor", "size": 600, "max_size": 1000})
    )
    server.add_repo("facebook/detr-tiny", files_of(tmp_path / "theirs"))
    torch.save(theirs.class_labels_classifier.weight.detach(), tmp_path / "head.pt")
    code = f"""
    import torch
    from hf_detr import DetrConfig, DetrForDetection, DetrImageProcessor
    head = torch.load({str(tmp_path / "head.pt")!r})
    model = DetrForDetection.from_pretrained("facebook/detr-tiny")
    assert torch.equal(model.class_labels_classifier.weight, head)
    model = DetrForDetection.from_pretrained(
        "facebook/detr-tiny", id2label={{0: "dog", 1: "cow"}}, ignore_mismatched_sizes=True
    )
    assert torch.equal(model.class_labels_classifier.weight[[0, 2]], head[[1, 3]])
    assert DetrConfig.from_pretrained("facebook/detr-tiny").backbone == "resnet18"
    assert dict(DetrImageProcessor.from_pretrained("facebook/detr-tiny").size)["longest_edge"] == 1000
    print("read")
    """
    assert clients.run(code, tmp_path / "home").strip() == "read"


FINETUNE = """
import os, runpy, sys
os.makedirs({cwd!r}, exist_ok=True)
os.chdir({cwd!r})
sys.argv = ["finetune.py", "--quick", "--push_to_hub", {repo!r}, "--license", "apache-2.0"]
runpy.run_path({script!r}, run_name="__main__")
"""


def test_finetune_pushes_its_best_checkpoint_with_a_card_of_that_run(server, clients, tmp_path):
    script = str(ROOT / "examples" / "finetune.py")
    code = FINETUNE.format(cwd=str(tmp_path / "work"), repo="ann/shapes", script=script)
    assert "Pushed: " in clients.run(code, tmp_path / "home", token="hf_ann")
    pushed = server.blobs_of("ann/shapes")
    run = tmp_path / "work" / "runs" / "shapes-quick-1"
    run = run if run.exists() else tmp_path / "work" / "runs" / "shapes-1"
    assert pushed["model.safetensors"] == (run / "model.safetensors").read_bytes()
    assert pushed["validation.png"] == (run / "validation.png").read_bytes()
    measured = json.loads((run / "metrics.json").read_text())
    card = ModelCard(pushed["README.md"].decode())
    (result,) = card.data.to_dict()["model-index"][0]["results"]
    assert result["metrics"][0]["value"] == pytest.approx(measured["AP"], abs=1e-4)
    assert "Measured on 16 images of the val split of shapes-quick" in str(card)
    assert "| ellipse |" in str(card)
    assert "| epochs | 2 |" in str(card)


def test_a_repository_without_permission_stops_the_run_before_it_starts(server, clients, tmp_path):
    script = str(ROOT / "examples" / "finetune.py")
    code = FINETUNE.format(cwd=str(tmp_path / "work"), repo="bob/shapes", script=script)
    with pytest.raises(ClientError, match=r"403.*rights to write under the namespace bob"):
        clients.run(code, tmp_path / "home", token="hf_ann")
    assert not (tmp_path / "work" / "runs").exists()


def test_a_repository_of_somebody_else_that_can_be_read_is_no_place_to_push_to(server, clients, tmp_path):
    server.add_repo("bob/public")
    code = "from hf_detr.hub import prepare_repo; print(prepare_repo('bob/public'))"
    with pytest.raises(ClientError, match=r"Cannot push to bob/public: 403"):
        clients.run(code, tmp_path / "home", token="hf_ann")
    assert "ann/mine" in clients.run(code.replace("bob/public", "ann/mine"), tmp_path / "home", token="hf_ann")


# -- the card --------------------------------------------------------------------------------------------------------


def test_the_card_states_what_was_measured_in_that_run(checkpoint):
    card = model_card_of(checkpoint, "ann/pets", license="mit")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "object-detection"
    assert data["license"] == "mit"
    assert data["base_model"] == "facebook/detr-resnet-50"
    assert "datasets" not in data, "the name of a folder may be that of somebody's data set on the Hub"
    assert model_card_of(checkpoint, "ann/pets", datasets=["ann/cats"]).data.to_dict()["datasets"] == ["ann/cats"]
    assert data["metrics"] == ["mean_average_precision"]
    (index,) = data["model-index"]
    assert index["name"] == "pets"
    (result,) = index["results"]
    assert result["dataset"] == {"name": "pets", "type": "custom", "split": "val"}
    assert [metric["value"] for metric in result["metrics"]] == [0.4, 0.401, 0.402]
    text = str(card)
    assert "Measured on 123 images of the val split of pets with these weights (epoch 7)" in text
    for row in ("| AP | 0.400 |", "| APl | n/a |", "| cat | 0.500 |", "| dog | 0.300 |", "| bird | n/a |"):
        assert row in text
    assert 'pipeline("object-detection", model="ann/pets", trust_remote_code=True)' in text
    assert "![Validation images" in text
    assert "| seed | 0 |" in text
    assert "/secret/place" not in text
    assert "64 x 96 pixels" in text
    assert ModelCard(text).data.to_dict() == data, "the metadata is read back"


def test_results_of_other_weights_do_not_enter_the_card(checkpoint):
    model = DetrForDetection.from_pretrained(checkpoint)
    model.class_labels_classifier.bias.data += 1
    model.save_pretrained(checkpoint)
    assert read_metrics(checkpoint) is None
    card = model_card_of(checkpoint, "ann/pets")
    assert "model-index" not in card.data.to_dict()
    assert "have not been evaluated" in str(card)
    assert not re.search(r"0\.4\d\d", str(card))
    assert "![" not in str(card), "the picture shows what other weights found"


def test_numbers_from_elsewhere_are_attributed_and_not_in_the_metadata():
    model = tiny_model()
    card = build_model_card(model, "ann/detr", metrics={"AP": 0.42}, source="From the paper, not measured again.")
    assert "From the paper, not measured again." in str(card)
    assert "| AP | 0.420 |" in str(card)
    assert "model-index" not in card.data.to_dict()


def test_the_template_can_be_replaced(checkpoint, tmp_path):
    template = tmp_path / "mine.md"
    template.write_text(
        "---\n{{ card_data }}\n---\nMine: {{ repo_id }}, AP {{ metrics[0][1] }}, {{ labels | length }}\n"
    )
    card = str(model_card_of(checkpoint, "ann/pets", template=template))
    assert "Mine: ann/pets, AP 0.400, 3" in card
    assert may_replace(card), "the next push renews it, so that no numbers of other weights stay"


def test_every_class_and_query_count_reads_well():
    one = tiny_model(id2label={0: "cat"}, label2id={"cat": 0})
    text = str(build_model_card(one, "ann/one"))
    assert "detects 1 class of objects" in text
    assert "\n\n\n" not in text
    assert io.StringIO(text).readline() == "---\n"


# -- Spaces ------------------------------------------------------------------------------------------------------------


def test_a_space_shows_the_pushed_model(checkpoint, server, clients, tmp_path):
    picture = tmp_path / "cat.png"
    Image.new("RGB", (8, 8)).save(picture)
    script = f"""
    import runpy, sys
    sys.stderr = sys.stdout
    sys.argv = ["push_to_hub.py", {str(checkpoint)!r}, "ann/pets", "--space", "pets-page"]
    sys.argv += ["--space_examples", {str(picture)!r}, "--private"]
    runpy.run_path({str(ROOT / "examples" / "push_to_hub.py")!r}, run_name="__main__")
    """
    printed = clients.run(script, tmp_path / "home", token="hf_ann")
    assert "/spaces/ann/pets-page" in printed
    assert "HF_TOKEN" in printed, "the model is private"
    assert "model.safetensors" in server.blobs_of("ann/pets")
    files = server.blobs_of("spaces/ann/pets-page")
    assert server.repos["spaces/ann/pets-page"].private
    assert files["examples/cat.png"] == picture.read_bytes()
    front = yaml.safe_load(files["README.md"].decode().split("---\n")[1])
    assert (front["sdk"], front["app_file"], front["models"]) == ("gradio", "app.py", ["ann/pets"])
    [requirement] = files["requirements.txt"].decode().split()
    assert requirement == f"hf_detr[app,video]=={hf_detr.__version__}"
    called = f"""
    import sys, types
    import hf_detr.cli
    hf_detr.cli.main = lambda arguments: print(*arguments)
    exec({files["app.py"].decode()!r})
    """
    assert clients.run(called, tmp_path / "home").split() == [
        "app", "--model", "ann/pets", "--examples", "examples",
    ]  # fmt: skip


def test_a_space_needs_a_model_that_is_on_the_hub(clients, server, tmp_path):
    code = """
    from hf_detr.hub import push_space
    for model in ("runs/shapes/1", "ann/nothing"):
        try:
            push_space(model, "ann/page")
        except Exception as error:
            print(type(error).__name__, "|", str(error).splitlines()[0])
    """
    first, second = clients.run(code, tmp_path / "home", token="hf_ann").splitlines()
    assert first.startswith("ValueError | A Space loads its model from the Hub by USER/NAME")
    assert second.startswith("RepositoryNotFoundError")
    assert "spaces/ann/page" not in server.repos
