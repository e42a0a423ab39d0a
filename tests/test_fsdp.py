"""FSDP2 on two processes against DistributedDataParallel: the same training, and weights that a plain model takes."""

import copy
import json
import os
from pathlib import Path

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from conftest import padded_batch, random_labels, tiny_model, tiny_segmentation
from script_runner import run_script
from torch.distributed.tensor import DTensor

from hf_detr import DetrForDetection, DetrForSegmentation
from hf_detr.training import parameter_groups
from hf_detr.training.sharding import gather_weights, sharding_plugin

pytestmark = pytest.mark.xdist_group("fsdp")  # its fixtures are expensive: one worker runs them once

KINDS = {
    "learned": {"query_type": "learned"},
    "anchor": {"query_type": "anchor", "denoising_groups": 2, "dense_loss_coefficient": 1, "class_loss": "iou_aware"},
    "batch norm that trains": {"query_type": "anchor", "freeze_batch_norm": False, "frozen_stages": -1},
    "masks": {"query_type": "anchor", "denoising_groups": 1},
}
# kind of model, precision
CASES = {
    "learned": ("learned", "no"),
    "anchor, bf16": ("anchor", "bf16"),
    "batch norm that trains": ("batch norm that trains", "no"),
    "masks": ("masks", "no"),
    "masks, bf16": ("masks", "bf16"),
}
SIZES = [(64, 96), (96, 64)]
STEPS = 4  # forward passes; the optimizer steps after every second
LAUNCHED = {  # as by `accelerate launch` with examples/accelerate/fsdp2.yaml
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def new_model(kind):
    torch.manual_seed(0)
    return (tiny_segmentation if kind == "masks" else tiny_model)(dropout=0.0, **KINDS[kind]).train()


def accelerator_for(sharded, precision):
    """Accelerate 1.15 shards on GPUs and their like only, and on a CPU makes DistributedDataParallel of it without a
    word. Everything after that decision, Accelerate's and PyTorch's, works on a CPU, so it is taken here."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name, value in LAUNCHED.items():
        os.environ.pop(name, None)
        if sharded:
            os.environ[name] = value
    plugin = sharding_plugin()
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2, fsdp_plugin=plugin)
    if sharded:
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def train(accelerator, model, optimizer, steps):
    """The mean loss over processes of each forward pass, and the norm of the gradients at each step."""
    losses, norms = [], []
    for step in range(steps):
        seed = 10 * step + accelerator.process_index
        sizes = SIZES if accelerator.process_index == 0 else SIZES[:1] * 2  # two calls of the mask head, and one
        pixel_values, pixel_mask = padded_batch(sizes, seed=seed)
        torch.manual_seed(seed)  # of the denoising queries
        labels = random_labels([3, 2 + accelerator.process_index])
        for label, size in zip(labels, sizes, strict=True):
            label["masks"] = torch.rand(len(label["boxes"]), *size) > 0.6
        with accelerator.accumulate(model):
            with accelerator.autocast():
                outputs = model(pixel_values, pixel_mask, labels=labels)
            accelerator.backward(outputs.loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
                norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(accelerator.reduce(outputs.loss.detach().float(), reduction="mean")))
    return losses, norms


def run_case(kind, precision, sharded, folder):
    accelerator = accelerator_for(sharded, precision)
    model = new_model(kind)
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 1e-3, 1e-4))
    model, optimizer = accelerator.prepare(model, optimizer)
    result = {"sharded": sum(isinstance(p, DTensor) for p in model.parameters())}
    result["losses"], result["norms"] = train(accelerator, model, optimizer, STEPS)
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        result["state"] = {name: tensor.clone() for name, tensor in state.items()}
    if sharded:
        plain = new_model(kind)
        gather_weights(model, plain)
        result["gathered"] = copy.deepcopy(plain.state_dict())
    accelerator.save_state(str(folder))
    result["goes on"], _ = train(accelerator, model, optimizer, STEPS)
    accelerator.load_state(str(folder))
    result["goes on after loading"], _ = train(accelerator, model, optimizer, STEPS)
    return result


def run_all(rank, folder):
    torch.set_num_threads(1)
    results = {}
    for name, (kind, precision) in CASES.items():
        for sharded in (False, True):
            where = folder / f"{name}-{sharded}"
            results[name, sharded] = run_case(kind, precision, sharded, where)
    torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fsdp")
    code, said = run_script(run_all, folder, cwd=folder, processes=2)
    assert code == 0, said
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_sharded_training_is_the_same_training(results, name):
    plain, sharded = results[0][name, False], results[0][name, True]
    assert plain["sharded"] == 0
    assert sharded["sharded"] == len(list(new_model(CASES[name][0]).parameters()))
    tolerance = 1e-4 if CASES[name][1] == "no" else 2e-3
    assert sharded["losses"] == pytest.approx(plain["losses"], rel=tolerance)
    assert sharded["norms"] == pytest.approx(plain["norms"], rel=10 * tolerance)
    assert sharded["losses"][-1] != pytest.approx(sharded["losses"][0], rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_the_whole_weights_are_those_of_a_plain_model(results, name):
    kind, precision = CASES[name]
    state = results[0][name, True]["state"]
    model = new_model(kind)
    model.load_state_dict(state)
    assert type(model) is (DetrForSegmentation if kind == "masks" else DetrForDetection)
    assert all(tensor.dtype == model.state_dict()[entry].dtype for entry, tensor in state.items())
    for rank in range(2):
        gathered = results[rank][name, True]["gathered"]
        assert all(torch.equal(gathered[entry], tensor) for entry, tensor in state.items() if "running" not in entry)
    if precision == "no":
        for entry, tensor in results[0][name, False]["state"].items():
            torch.testing.assert_close(state[entry], tensor, atol=5e-4, rtol=1e-3, msg=entry)


@pytest.mark.parametrize("name", CASES)
def test_a_saved_state_is_where_it_goes_on_from(results, name):
    sharded = results[0][name, True]
    assert sharded["goes on after loading"] == pytest.approx(sharded["goes on"], rel=1e-5)


def test_only_layers_that_exist_are_named_for_sharding():
    expected = {"learned": "DecoderLayer", "anchor": "AnchorDecoderLayer"}
    for query_type, decoder_layer in expected.items():
        model = tiny_model(query_type=query_type)
        assert set(model._no_split_modules) == {"Backbone", "EncoderLayer", decoder_layer}


def test_settings_that_would_break_are_refused(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert sharding_plugin() is None
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert sharding_plugin().mixed_precision_policy.param_dtype is None
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading"):
        sharding_plugin()
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match="fsdp_version to 2"):
        sharding_plugin()


def shard_on_cpu():
    """Take the one decision of Accelerate that keeps sharding from CPUs, see `accelerator_for`."""
    begin = accelerate.Accelerator.__init__

    def sharding(self, *args, fsdp_plugin=None, **kwargs):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        PartialState._shared_state["distributed_type"] = self.state.distributed_type = DistributedType.FSDP
        self.state.fsdp_plugin = fsdp_plugin

    accelerate.Accelerator.__init__ = sharding


def test_finetune_sharded_is_finetune_and_goes_on(tmp_path):
    """The script itself."""
    script = Path(__file__).parents[1] / "examples" / "finetune.py"

    def finetune(*arguments, sharded=True, **options):
        environment = LAUNCHED if sharded else {}
        return run_script(script, *arguments, cwd=tmp_path, processes=2, environment=environment, **options)

    def losses(name):
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]

    options = ["--quick", "--mixed_precision", "no", "--batch_size", "8", "--gradient_accumulation_steps", "2"]
    options += ["--set", "denoising_groups=0", "d_model=32", "encoder_layers=1", "decoder_layers=1"]
    code, said = finetune(*options, "--output_dir", "plain", sharded=False)
    assert code == 0, said
    code, said = finetune(*options, "--output_dir", "sharded", setup=shard_on_cpu)
    assert code == 0, said
    assert losses("sharded") == pytest.approx(losses("plain"), rel=1e-3)
    plain, sharded = (DetrForDetection.from_pretrained(tmp_path / name / "last") for name in ("plain", "sharded"))
    # AdamW's first steps turn the rounding of a gradient near zero into a whole step, so that weights tell nothing more
    assert plain.state_dict().keys() == sharded.state_dict().keys()
    code, said = finetune("--output_dir", "sharded", "--resume", "--epochs", "3", setup=shard_on_cpu)
    assert code == 0, said
    assert "Resumed after epoch 2" in said
    assert len(losses("sharded")) == 3
    code, said = finetune(*options)
    assert code == 1
    assert "Accelerate does not shard models on cpu" in said
    assert "Traceback" not in said
    assert "--ema averages whole weights" in finetune(*options, "--ema", "0.9", setup=shard_on_cpu)[1]
