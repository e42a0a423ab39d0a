"""FSDP2 through Accelerate: the settings that a detector needs, and the full weights of a sharded model."""

import os

from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn


def is_sharded() -> bool:
    """Whether `accelerate launch` was configured for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def sharding_plugin() -> FullyShardedDataParallelPlugin | None:
    """`fsdp_plugin` for the `Accelerator`: None unless `accelerate launch` was configured for FSDP.

    Everything is as launched except the precision. Accelerate's own policy casts all inputs and outputs of the model,
    including the boxes of the labels, which bfloat16 rounds by pixels, and the box head, which computes in the
    precision of its weights. Here weights stay float32, and the training step runs in `accelerator.autocast()`, which
    without FSDP already wraps the model.

    Raises:
        ValueError: FSDP1; or `fsdp_cpu_ram_efficient_loading`, which does not distribute buffers (frozen batch norm).
    """
    if not is_sharded():
        return None
    from torch.distributed.fsdp import MixedPrecisionPolicy  # a slow import

    if os.environ.get("FSDP_VERSION") != "2":
        raise ValueError("FSDP1 is not supported: set fsdp_version to 2, see examples/accelerate/fsdp2.yaml.")
    plugin = FullyShardedDataParallelPlugin(mixed_precision_policy=MixedPrecisionPolicy())
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "Set fsdp_cpu_ram_efficient_loading to false: it distributes weights only, not the buffers of batch norm."
        )
    return plugin


def check_sharding(accelerator: Accelerator, *, ema: bool, auto_batch_size: bool) -> None:
    """Reject what FSDP does not support.

    Raises:
        ValueError: FSDP was configured, but Accelerate does not shard on this device and would silently train without
            it; or FSDP is combined with averaged weights or automatic batch sizes, which need unsharded weights.
    """
    if is_sharded() and not accelerator.is_fsdp2:
        raise ValueError(f"Accelerate does not shard models on {accelerator.device.type}. Launch without FSDP.")
    if ema and accelerator.is_fsdp2:
        raise ValueError("--ema averages whole weights, but FSDP shards them. Omit one of the two.")
    if auto_batch_size and accelerator.is_fsdp2:
        raise ValueError("--auto_batch_size tries batches on an unsharded model, which FSDP avoids. Omit it.")


def gather_weights(sharded: nn.Module, plain: nn.Module) -> None:
    """Copy the weights of a model that FSDP2 shards into an unsharded one of the same config, on every process. To be
    called on all processes together. The copy can then run on some processes only; the sharded model gathers its
    weights from all processes in every forward pass."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    plain.load_state_dict(get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True)))
