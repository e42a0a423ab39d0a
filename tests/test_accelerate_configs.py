"""The launch configs of examples/accelerate: Accelerate knows every key, and makes of each what its name says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from hf_detr.training.sharding import sharding_plugin

EXAMPLES = Path(__file__).parents[1] / "examples"
CONFIGS = sorted((EXAMPLES / "accelerate").glob("*.yaml"))


def launched(path):
    """The environment with which `accelerate launch` would start the script."""
    args = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    args, _, _ = _validate_launch_command(args)
    several = args.multi_gpu or args.use_fsdp
    return prepare_multi_gpu_env(args) if several else prepare_simple_launcher_cmd_env(args)[1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_knows_every_key(path):
    config = load_config_from_file(str(path))  # refuses keys that it does not know
    assert isinstance(config, ClusterConfig)
    known = vars(launch_command_parser().parse_args(["script.py"]))
    nested = [key for value in yaml.safe_load(path.read_text()).values() if isinstance(value, dict) for key in value]
    assert not set(nested) - set(known)


def test_each_config_is_what_its_name_says():
    expected = {
        "single_gpu": (DistributedType.NO, 1, 1, False),
        "eight_gpus": (DistributedType.MULTI_GPU, 1, 8, False),
        "fsdp2": (DistributedType.FSDP, 1, 8, False),
        "two_machines": (DistributedType.MULTI_GPU, 2, 16, False),
        "cpu": (DistributedType.NO, 1, 1, True),
    }
    assert {path.stem for path in CONFIGS} == set(expected)
    for path in CONFIGS:
        config = load_config_from_file(str(path))
        found = (config.distributed_type, config.num_machines, config.num_processes, config.use_cpu)
        assert found == expected[path.stem], path.stem


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_precision_is_left_to_the_script(path):
    environment = launched(path)
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"


def test_sharding_as_launched_is_what_we_take(monkeypatch):
    environment = launched(EXAMPLES / "accelerate" / "fsdp2.yaml")
    for name, value in environment.items():
        if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP")):
            monkeypatch.setenv(name, value)
    plugin = sharding_plugin()
    assert plugin is not None
    assert plugin.reshard_after_forward is True
    assert not plugin.cpu_ram_efficient_loading


def test_two_machines_find_each_other(tmp_path):
    """Both of them this one, with a process each on the CPU."""
    script = tmp_path / "script.py"
    script.write_text(
        "import torch\n"
        "from accelerate import Accelerator\n"
        "accelerator = Accelerator(cpu=True)\n"
        "ranks = accelerator.gather(torch.tensor([accelerator.process_index]))\n"
        "print('ranks', ranks.tolist(), 'writes' if accelerator.is_main_process else 'waits', flush=True)\n"
        "accelerator.wait_for_everyone()\n"
        "accelerator.end_training()\n"
    )
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file",
        str(EXAMPLES / "accelerate" / "two_machines.yaml"), "--num_processes", "2", "--main_process_ip", "127.0.0.1",
        "--main_process_port", str(20000 + os.getpid() % 20000), "--machine_rank",
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "true"}
    machines = [
        subprocess.Popen([*command, rank, str(script)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0]
    assert "ranks [0, 1] writes" in outputs[0]
    assert "ranks [0, 1] waits" in outputs[1]


def test_the_readme_names_every_script_and_config():
    text = (EXAMPLES / "README.md").read_text()
    scripts = {path.name for path in EXAMPLES.glob("*.py")}
    assert set(re.findall(r"^\| `(\w+\.py)`", text, re.MULTILINE)) == scripts
    assert set(re.findall(r"examples/accelerate/(\w+\.yaml)", text)) == {path.name for path in CONFIGS}
