"""Step 2, its plumbing: build a timm network up to a feature level, freeze its first stages, load its weights."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import adapt_input_conv
from torch import Tensor, nn

# Networks made for one image size need arguments to take any size; which of these they have differs by family.
ANY_SIZE_KWARGS = {"dynamic_img_size": True, "dynamic_img_pad": True, "strict_img_size": False}
PADDED_MULTIPLE = 32  # what images are padded to for networks that add up levels of different strides


def create_network(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """`timm.create_model`, for images of any size.

    Raises:
        ValueError: timm has no model of that name; lists similar names.
    """
    try:
        network = timm.create_model(name, pretrained=pretrained, **kwargs)
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise
        similar = ", ".join(timm.list_models(f"*{name[:6]}*")[:8])
        raise ValueError(f'timm has no model "{name}". Similar names: {similar or "none"}.') from error
    for module in network.modules():
        if hasattr(module, "dynamic_img_pad"):  # pad images to whole patches: Swin has no argument for it
            module.dynamic_img_pad = True
    return network


def plan_levels(
    name: str, feature_stride: int | None, further_strides: Sequence[int], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The arguments that build a network with the wanted feature levels, and timm's `feature_info` of all levels up to
    the deepest wanted one. Builds on the `meta` device.

    Args:
        feature_stride: stride of the deepest wanted level; None takes the network's deepest.
        further_strides: of shallower levels that are wanted as well; of several with one stride, the deepest. If no
            shallower level has the stride of the deepest wanted one, that level stands for both.

    Raises:
        ValueError: the network does not take the arguments, gives no features, or has no level of a stride.
    """
    with torch.device("meta"):
        try:
            parameters = inspect.signature(type(create_network(name, **kwargs)).__init__).parameters
        except TypeError as error:
            raise ValueError(
                f'timm\'s "{name}" does not take these arguments (output_stride is dilation): {error}'
            ) from error
        kwargs = {k: v for k, v in ANY_SIZE_KWARGS.items() if k in parameters} | kwargs
        try:
            feature_info: Any = create_network(name, features_only=True, **kwargs).feature_info
            levels = feature_info.info
        except (RuntimeError, AssertionError, NotImplementedError, TypeError, AttributeError) as error:
            raise ValueError(f'timm\'s "{name}" does not support features_only=True: {error}') from error
    strides = [int(level["reduction"]) for level in levels]
    deepest = strides[-1] if feature_stride is None else feature_stride
    if deepest in strides:  # of several levels with one stride, the deepest
        last = max(index for index, stride in enumerate(strides) if stride == deepest)
        levels, strides = levels[: last + 1], strides[: last + 1]
    missing = {deepest, *further_strides} - set(strides)
    if missing:
        below = "" if feature_stride is None or deepest in missing else f" up to its level of stride {deepest}"
        raise ValueError(
            f'"{name}" has no feature level of stride {min(missing)}{below}; it has {sorted(set(strides))}.'
        )
    shallower = {stride: index for index, stride in enumerate(strides[:-1])}  # the last one of each stride
    indices = sorted({last, *(shallower.get(stride, last) for stride in further_strides)})
    arguments = kwargs | {"features_only": True, "out_indices": tuple(indices)}
    return arguments, [dict(level) for level in levels]


def feature_strides(name: str) -> list[int]:
    """The strides in pixels of the feature levels that a timm network has; errors as of [`plan_levels`]."""
    _, levels = plan_levels(name, None, (), {})
    return [int(level["reduction"]) for level in levels]


def channels_first(network: nn.Module, features: Tensor) -> Tensor:
    """Features of a timm network as (B, C, h, w), whatever it returns."""
    return features.permute(0, 3, 1, 2) if getattr(network, "output_fmt", None) == "NHWC" else features


def probe_network(network: nn.Module, name: str, kwargs: dict[str, Any]) -> tuple[list[str], int]:
    """What a network needs that timm does not tell, asked of a copy on the `meta` device, which computes nothing and
    draws no random numbers from the caller.

    Returns:
        the names of parameters that timm fixed, or that the features do not depend on (timm builds some networks in
        full whatever level is wanted, and DistributedDataParallel waits for the gradient of every parameter); and of
        what number the sides of an image must be a multiple, 1 or 32.

    Raises:
        ValueError: the network takes images of one size, or of some sizes, only.
    """

    def used(device: str, multiple: int) -> set[str]:
        no_draws = torch.random.fork_rng(devices=[])
        with no_draws, torch.device(device), torch.inference_mode(False), torch.enable_grad():
            copy: Any = create_network(name, **kwargs).eval()
            height, width = copy.pretrained_cfg["input_size"][-2:]
            # a size that no network was made for
            size = [-(-side // multiple) * multiple for side in (height + height // 4 + 1, width + width // 2 + 1)]
            trained = {name: tensor for name, tensor in copy.named_parameters() if tensor.requires_grad}
            levels = copy(torch.zeros(1, kwargs["in_chans"], *size))
            total = torch.stack([level.sum() for level in levels]).sum()
            gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
        return {name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None}

    # meta tensors have no values, so that an index beyond a table of relative positions is not noticed
    devices = (
        ["cpu"] if any("rel_pos_" in parameter for parameter, _ in network.named_parameters()) else ["meta", "cpu"]
    )
    reason: Exception | None = None
    for multiple in (1, PADDED_MULTIPLE):
        for device in devices:
            try:
                names = used(device, multiple)
            except (RuntimeError, AssertionError, ValueError, IndexError) as error:
                reason = error
                if "meta tensors" not in str(error).lower():  # else it reads values to know its sizes (gemma4_vit)
                    break
            else:
                return [name for name, _ in network.named_parameters() if name not in names], multiple
    raise ValueError(
        f'timm\'s "{name}" does not take images of any size, which a detector needs ({reason}). Choose another '
        "network, such as resnet50, convnext_tiny, swin_tiny_patch4_window7_224 or vit_small_patch16_224."
    ) from reason


def modules_of_frozen_stages(
    network: nn.Module, name: str, frozen_stages: int, levels: list[dict[str, Any]]
) -> list[tuple[str, nn.Module]]:
    """The modules of the stem (0) and the first n stages, by name. A stage is a level of stride 4 or more in timm's
    `feature_info`; whatever comes before the first of them is the stem.

    Raises:
        ValueError: the network does not have so many stages, or it cannot be known where they end.
    """
    if frozen_stages < 0:
        return []
    first_stage = next((i for i, level in enumerate(levels) if level["reduction"] >= 4), len(levels))
    num_stages = len(levels) - first_stage
    if frozen_stages > num_stages:
        stride = levels[-1]["reduction"]
        raise ValueError(f'frozen_stages={frozen_stages}, but "{name}" has {num_stages} stages up to stride {stride}.')
    last = first_stage + frozen_stages - 1  # the level that ends the frozen part; -1: what comes before level 0
    if last >= 0:
        return list(_modules_in_order(network, name, str(levels[last]["module"]), inclusive=True))
    return list(_modules_in_order(network, name, str(levels[0]["module"]), inclusive=False))


def _modules_in_order(network: nn.Module, name: str, end: str, inclusive: bool) -> Iterator[tuple[str, nn.Module]]:
    """Modules in timm's order of execution, up to the module called `end`, with it or without.

    timm flattens containers ("stages.0" becomes "stages_0") or wraps the network ("model.blocks.0"), so names are
    compared with dots as underscores and without the wrapper.
    """

    def plain(name: str) -> str:
        return name.removeprefix("model.").replace(".", "_") + "_"

    reached = False
    for module_name, module in network.named_modules():
        inside = plain(module_name).startswith(plain(end))
        if (reached and not inside) or (inside and not inclusive):
            return
        reached = reached or inside
        yield module_name, module
    if not reached:
        raise ValueError(
            f'Cannot find where the stages of "{name}" end: timm reports {end}, which is not a module of it. Set '
            "frozen_stages=-1 and freeze parameters yourself."
        )


def pretrained_normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation, per channel, of the images that timm's weights for this network were trained on.
    None where timm has no weights."""
    settings = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return None if settings is None else (tuple(settings.mean), tuple(settings.std))


def pretrained_state_dict(name: str, kwargs: dict[str, Any], checkpoint: str | Path | None) -> dict[str, Tensor]:
    """timm's pretrained weights for a network that is built with these arguments.

    Args:
        checkpoint: a local file of weights for the whole timm network, `.safetensors` or a pickle, which is opened with
            `weights_only=True`. None downloads the weights that timm names, from the Hub.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file does not hold the weights of this network.
    """
    overlay: dict[str, Any] = {}
    if checkpoint is not None:
        checkpoint = Path(checkpoint)
        if not checkpoint.is_file():
            raise FileNotFoundError(f"No backbone weights at {checkpoint}.")
        overlay["pretrained_cfg_overlay"] = {"file": str(checkpoint), "source": ""}
    # The same seed twice: a weight that equals its random twin is one the file did not set.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random = dict(create_network(name, **kwargs).named_parameters())
        torch.manual_seed(0)
        try:
            loaded = create_network(name, pretrained=True, **kwargs, **overlay).state_dict()
        except (RuntimeError, KeyError, SafetensorError) as error:
            if checkpoint is None:
                raise
            raise ValueError(f'{checkpoint} does not hold weights of timm\'s "{name}": {error}') from error
    weights = [name for name, tensor in random.items() if tensor.ndim > 1 and tensor.count_nonzero()]
    untouched = [name for name in weights if torch.equal(loaded[name], random[name])]
    if untouched:
        raise ValueError(
            f"{checkpoint or 'The pretrained checkpoint'} has no weights for {len(untouched)} tensors of "
            f'"{name}", the first is {untouched[0]}. Is it a checkpoint of another network?'
        )
    return loaded


@torch.no_grad()
def adapt_input(network: nn.Module, name: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Change the number of channels that a trained network takes, in place, as timm does with its pretrained weights:
    the weights of its first convolution are summed for one channel, and repeated and scaled for others.

    Args:
        before, after: arguments that build the network; only `in_chans` differs.

    Raises:
        ValueError: the network does not take 3 channels now, or its first layer is not a convolution.
    """
    if before["in_chans"] != 3:
        raise ValueError(
            f'The first convolution of "{name}" takes {before["in_chans"]} channels; only 3 can be adapted.'
        )
    with torch.random.fork_rng(devices=[]):
        fresh = create_network(name, **after)
    wanted = dict(fresh.named_parameters())
    for path, weight in list(network.named_parameters()):
        if weight.shape == wanted[path].shape:
            continue
        try:
            adapted = adapt_input_conv(after["in_chans"], weight)
        except NotImplementedError as error:
            raise ValueError(f'"{name}" cannot be adapted to {after["in_chans"]} channels: {error}') from error
        owner, _, attribute = path.rpartition(".")
        old, layer = network.get_submodule(owner), fresh.get_submodule(owner).to(weight)
        layer.load_state_dict(old.state_dict() | {attribute: adapted})
        for parameter, before_it in zip(layer.parameters(), old.parameters(), strict=True):
            parameter.requires_grad_(before_it.requires_grad)
        network.set_submodule(owner, layer.train(old.training))
