"""FSDP2 through Accelerate: the settings that a detector needs, and the whole weights of a sharded one."""

import os

from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn


def sharding_plugin() -> FullyShardedDataParallelPlugin | None:
    """`fsdp_plugin` for the `Accelerator`: None unless `accelerate launch` was told to use FSDP.

    All is as launched but for the precision. Accelerate's own policy casts whatever goes into the model and comes out
    of it, the boxes of the labels included, which bfloat16 rounds by pixels; it also casts the box head, which computes
    in the precision of its weights. Here weights stay float32, and the training step runs in `accelerator.autocast()`,
    which without FSDP is around the model already.

    Raises:
        ValueError: FSDP1; or `fsdp_cpu_ram_efficient_loading`, which cannot distribute buffers (frozen batch norm).
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    from torch.distributed.fsdp import MixedPrecisionPolicy  # takes its time, and few need it

    if os.environ.get("FSDP_VERSION") != "2":
        raise ValueError("FSDP1 is not supported: set fsdp_version to 2, see examples/accelerate/fsdp2.yaml.")
    plugin = FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "Set fsdp_cpu_ram_efficient_loading to false: it distributes weights only, not the buffers of batch norm."
        )
    return plugin


def check_sharding(accelerator: Accelerator, *, ema: bool, auto_batch_size: bool) -> None:
    """Refuse what FSDP would do otherwise than it was asked to.

    Raises:
        SystemExit: the launcher was told to use FSDP, but Accelerate does not shard on this device and would train as
            without it; or weights are to be averaged, or batches tried out, which takes weights in one piece.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not accelerator.is_fsdp2:
        raise SystemExit(f"Accelerate does not shard models on {accelerator.device.type}. Launch without FSDP.")
    if ema and accelerator.is_fsdp2:
        raise SystemExit("--ema averages whole weights, but FSDP cuts them up. Leave one of the two out.")
    if auto_batch_size and accelerator.is_fsdp2:
        raise SystemExit("--auto_batch_size tries batches on a whole model, which FSDP avoids. Leave it out.")


def gather_weights(sharded: nn.Module, plain: nn.Module) -> None:
    """Copy the weights of a model that FSDP2 shards into one of the same config, on every process; all of them have to
    come here. The copy can then run on some processes only, and as often as each likes: the sharded one gathers its
    weights from all processes in every forward pass, and would wait for them."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    plain.load_state_dict(get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True)))
