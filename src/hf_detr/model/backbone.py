"""Step 2: a timm network turns pixels into a feature map and says which of its cells show image, not padding."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.utils.model import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .folding import find_pairs, fold, fold_for_good
from .memory_format import preferred_memory_format, replace_unsafe_convolutions

# Networks made for one image size have to be told to take any; which of these they know differs by family.
ANY_SIZE_KWARGS = {"dynamic_img_size": True, "dynamic_img_pad": True, "strict_img_size": False}


def _create(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    try:
        network = timm.create_model(name, pretrained=pretrained, **kwargs)
        for module in network.modules():
            if hasattr(module, "dynamic_img_pad"):  # patches that do not divide the image: Swin has no argument for it
                module.dynamic_img_pad = True
        return network
    except RuntimeError as error:
        if "Unknown model" not in str(error):
            raise
        similar = ", ".join(timm.list_models(f"*{name[:6]}*")[:8])
        raise ValueError(f'timm has no model "{name}". Names that look alike: {similar or "none"}.') from error


def _create_copy(name: str, kwargs: dict[str, Any]) -> Any:
    """A network to learn sizes and structure from. It takes no random numbers from those who train."""
    with torch.random.fork_rng(devices=[]):
        return _create(name, **kwargs).eval()


def _plan(name: str, feature_stride: int | None, kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The arguments that build the network up to the wanted level, and its levels up to there. Builds on `meta`."""
    with torch.device("meta"):
        try:
            parameters = inspect.signature(type(_create(name, **kwargs)).__init__).parameters
        except TypeError as error:
            raise ValueError(
                f'timm\'s "{name}" does not take these arguments (output_stride is dilation): {error}'
            ) from error
        kwargs = {k: v for k, v in ANY_SIZE_KWARGS.items() if k in parameters} | kwargs
        try:
            feature_info: Any = _create(name, features_only=True, **kwargs).feature_info
            levels = feature_info.info
        except (RuntimeError, AssertionError, NotImplementedError, TypeError, AttributeError) as error:
            raise ValueError(f'timm\'s "{name}" does not support features_only=True: {error}') from error
    strides = [int(level["reduction"]) for level in levels]
    wanted = strides[-1] if feature_stride is None else feature_stride
    if wanted not in strides:
        raise ValueError(f'"{name}" has no feature level of stride {wanted}; it has {sorted(set(strides))}.')
    index = max(i for i, stride in enumerate(strides) if stride == wanted)
    return kwargs | {"features_only": True, "out_indices": (index,)}, [dict(level) for level in levels[: index + 1]]


def feature_strides(name: str) -> list[int]:
    """The strides in pixels of the feature levels that a timm network has; errors as of [`Backbone`]."""
    _, levels = _plan(name, None, {})
    return [int(level["reduction"]) for level in levels]


class _SizeTable:
    """(rows, columns) of the feature map for images of some (height, width), asked of a copy of the network that has no
    weights and computes nothing (on the device "cpu": random weights). No module, so that the copy is no part of the
    model."""

    def __init__(self, name: str, kwargs: dict[str, Any], device: str) -> None:
        self.name, self.kwargs, self.device = name, kwargs, device
        self.network: Any = None
        self.known: dict[tuple[int, int], tuple[int, int]] = {}

    def look_up(self, size: tuple[int, int]) -> tuple[int, int]:
        if size not in self.known:
            with torch.device(self.device), torch.inference_mode(False), torch.no_grad():
                self.network = self.network or _create_copy(self.name, self.kwargs)
                features: Tensor = self.network(torch.zeros(1, self.kwargs["in_chans"], *size))[0]
            height_first = getattr(self.network, "output_fmt", None) == "NHWC"
            rows, columns = features.shape[1:3] if height_first else features.shape[2:]
            self.known[size] = rows, columns
        return self.known[size]


class Backbone(nn.Module):
    """Features of one level of any timm network that supports `features_only=True`.

    **Padding.** An image gives the same features alone and beside larger ones: the network sees each image without
    its padding, images of equal size together, and the *feature maps* are padded. The mask comes from their real
    sizes, and no FLOPs are spent on padding. Convolving the padded batch instead would let padding leak into the
    image, since after the first bias or norm it is no longer zero. Three cases have to take the padded batch as it
    is, with the mask downsampled to the stride: batch norm that gathers statistics in training (it must see the whole
    batch at once), tracing by `torch.compile`, `torch.export` or `torch.jit` (sizes are data there), and a mask that
    is not one rectangle at the top left.

    Args:
        name: timm model name.
        in_channels: channels of the images.
        output_stride: dilate the last stages down to this stride (16 is the paper's DC5), or None.
        feature_stride: take the deepest level of this stride; None takes the deepest of all.
        freeze_batch_norm: fix statistics and affine parameters of every batch norm, keeping its eps.
        frozen_stages: -1 nothing, 0 the stem, n the stem and the first n stages. A stage is a level of stride 4 or
            more in timm's `feature_info`; whatever comes before the first of them is the stem.
        kwargs: more arguments for `timm.create_model`.

    Attributes:
        channels, stride: of the feature map.
        level: its index among the network's feature levels.
        memory_format: that images are brought to; channels-last if the network convolves.

    Raises:
        ValueError: timm does not know the name, the network cannot give features, or has no level of that stride.
    """

    def __init__(
        self,
        name: str,
        *,
        in_channels: int = 3,
        output_stride: int | None = None,
        feature_stride: int | None = None,
        freeze_batch_norm: bool = True,
        frozen_stages: int = 1,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        kwargs = dict(kwargs or {}, in_chans=in_channels)
        if output_stride is not None:
            kwargs["output_stride"] = output_stride
        self.name = name
        self._built_empty = torch.empty(0).is_meta  # by `from_pretrained`; timm's own initialisation had no effect
        self._create_kwargs, levels = _plan(name, feature_stride, kwargs)
        self.channels = int(levels[-1]["num_chs"])
        self.stride = int(levels[-1]["reduction"])
        self.level = len(levels) - 1
        self.model = _create(name, **self._create_kwargs)
        if freeze_batch_norm:
            self.model = freeze_batch_norm_2d(self.model)
        device = "meta"
        try:
            unused, self._pairs = self._dry_run(device)
        except RuntimeError as error:
            if "meta tensors" not in str(error).lower():
                raise
            device = "cpu"  # the network reads values to know its sizes (gemma4_vit), and meta tensors have none
            unused, self._pairs = self._dry_run(device)
        self._size_table = _SizeTable(name, self._create_kwargs, device)
        self._frozen = self._freeze_norms_up_to(frozen_stages, levels) + unused
        self.freeze()
        replace_unsafe_convolutions(self.model)
        self.memory_format = preferred_memory_format(self.model)
        fold(self.model, self._pairs)

    # -- which parts train ---------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Stop the training of the frozen stages. Also called after `from_pretrained`, which replaces the parameters
        and forgets that they were frozen."""
        parameters = dict(self.model.named_parameters())
        for name in self._frozen:
            if name in parameters:  # a batch norm that was frozen since then has none
                parameters[name].requires_grad_(False)

    def _freeze_norms_up_to(self, frozen_stages: int, levels: list[dict[str, Any]]) -> list[str]:
        """Fix the batch norms of the frozen stages; returns the names of all parameters up to there."""
        if frozen_stages < 0:
            return []
        first_stage = next((i for i, level in enumerate(levels) if level["reduction"] >= 4), len(levels))
        num_stages = len(levels) - first_stage
        if frozen_stages > num_stages:
            raise ValueError(
                f'frozen_stages={frozen_stages}, but "{self.name}" has {num_stages} stages up to stride {self.stride}.'
            )
        last = first_stage + frozen_stages - 1  # the level that ends the frozen part; -1: what comes before level 0
        end = str(levels[last]["module"]) if last >= 0 else None
        frozen = []
        for name, module in list(self._in_order(end=end, before=None if end else str(levels[0]["module"]))):
            prefix = f"{name}." if name else ""
            frozen += [prefix + parameter for parameter, _ in module.named_parameters(recurse=False)]
            if isinstance(module, _BatchNorm):
                owner, _, attribute = name.rpartition(".")
                setattr(self.model.get_submodule(owner), attribute, freeze_batch_norm_2d(module))
                frozen = [parameter for parameter in frozen if not parameter.startswith(prefix)]  # now buffers
        return frozen

    def freeze_batch_norm(self) -> None:
        """Fix statistics and affine parameters of every batch norm from now on, in place."""
        self.model = freeze_batch_norm_2d(self.model)
        fold(self.model, self._pairs)

    def _dry_run(self, device: str) -> tuple[list[str], dict[str, str]]:
        """Parameters that do not train since timm fixed them or the features do not depend on them, and which batch
        norm follows which convolution.

        timm builds some networks whole, whatever level is asked for; what never gets a gradient must not wait for one
        (DistributedDataParallel does)."""
        with torch.device(device), torch.inference_mode(False), torch.enable_grad():
            network = _create_copy(self.name, self._create_kwargs)
            size = network.pretrained_cfg["input_size"][-2:]
            features, pairs = find_pairs(network, torch.zeros(1, self._create_kwargs["in_chans"], *size))
            trained = {name: tensor for name, tensor in network.named_parameters() if tensor.requires_grad}
            gradients = torch.autograd.grad(features[0].sum(), list(trained.values()), allow_unused=True)
        used = {name for name, gradient in zip(trained, gradients, strict=True) if gradient is not None}
        # frozen batch norms have buffers instead
        return [name for name, _ in self.model.named_parameters() if name not in used], pairs

    def _in_order(self, end: str | None, before: str | None) -> Iterator[tuple[str, nn.Module]]:
        """Modules in timm's order of execution, up to and including the module called `end`, or up to `before`.

        timm flattens containers ("stages.0" becomes "stages_0") or wraps the network ("model.blocks.0"), so names
        are compared with dots as underscores and without the wrapper.
        """

        def plain(name: str) -> str:
            return name.removeprefix("model.").replace(".", "_") + "_"

        target = plain(str(end or before))
        reached = False
        for name, module in self.model.named_modules():
            inside = plain(name).startswith(target)
            if (reached and not inside) or (inside and before):
                return
            reached = reached or inside
            yield name, module
        if not reached:
            raise ValueError(
                f'Cannot tell where the stages of "{self.name}" end: timm reports {end or before}, which is no module '
                "of it. Set frozen_stages=-1 and freeze what you want by hand."
            )

    @torch.no_grad()
    def prepare_for_inference(self) -> None:
        """Fold every batch norm into the convolution before it for good, in place: weights and norms are those of no
        checkpoint any more, the features are the same."""
        self.freeze_batch_norm()
        fold_for_good(self.model)
        self.model.to(memory_format=self.memory_format)  # type: ignore[call-overload]

    def sees_whole_batches(self) -> bool:
        """True while some batch norm computes statistics of the batch, so that images must not be run apart."""
        return self.training and any(isinstance(m, _BatchNorm) and m.training for m in self.model.modules())

    # -- weights -------------------------------------------------------------------------------------------------

    def load_pretrained(self, checkpoint: str | Path | None = None) -> None:
        """Load timm's pretrained weights in place.

        Args:
            checkpoint: a local file of weights for the whole timm network, `.safetensors` or a pickle, which is
                opened with `weights_only=True`. None downloads the weights that timm names, from the Hub.

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
            random = dict(_create(self.name, **self._create_kwargs).named_parameters())
            torch.manual_seed(0)
            try:
                loaded = _create(self.name, pretrained=True, **self._create_kwargs, **overlay).state_dict()
            except (RuntimeError, KeyError, SafetensorError) as error:
                if checkpoint is None:
                    raise
                raise ValueError(f'{checkpoint} does not hold weights of timm\'s "{self.name}": {error}') from error
        weights = [name for name, tensor in random.items() if tensor.ndim > 1 and tensor.count_nonzero()]
        untouched = [name for name in weights if torch.equal(loaded[name], random[name])]
        if untouched:
            raise ValueError(
                f"{checkpoint or 'The pretrained checkpoint'} has no weights for {len(untouched)} tensors of "
                f'"{self.name}", the first is {untouched[0]}. Is it a checkpoint of another network?'
            )
        self.model.load_state_dict(loaded)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill what `from_pretrained` left open: timm's initial weights where a checkpoint had none, and the buffers
        that are never saved (such as Swin's relative positions), which come back empty from the `meta` device."""
        if not self._built_empty:
            return
        state = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        empty = {name for name, tensor in state.items() if not getattr(tensor, "_is_hf_initialized", False)}
        if not empty:
            return
        fresh_model = _create(self.name, **self._create_kwargs)
        fresh = dict(fresh_model.named_parameters()) | dict(fresh_model.named_buffers())
        for name in empty:
            state[name].copy_(fresh[name])

    # -- forward -------------------------------------------------------------------------------------------------

    def _features(self, pixel_values: Tensor) -> Tensor:
        dtype = next(self.model.parameters()).dtype
        features: Tensor = self.model(pixel_values.to(dtype).contiguous(memory_format=self.memory_format))[0]
        if getattr(self.model, "output_fmt", None) == "NHWC":
            features = features.permute(0, 3, 1, 2)
        return features

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Args:
            pixel_values: (B, 3, H, W), normalised, padded at the bottom and the right.
            pixel_mask: (B, H, W), 1 = image, 0 = padding; None if nothing is padded.

        Returns:
            feature_map (B, channels, h, w) and its mask (B, h, w), bool, True = image; None if nothing is padded.
        """
        if pixel_mask is None:
            return self._features(pixel_values), None
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
        sizes = None if tracing else image_sizes(pixel_mask)
        if sizes is None or (len(set(sizes)) > 1 and self.sees_whole_batches()):
            return self._padded_batch(pixel_values, pixel_mask)
        return self._by_size(pixel_values, sizes)

    def feature_sizes(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> list[tuple[int, int]]:
        """(rows, columns) of the features of each image without its padding, as [`forward`] makes them of images that
        it runs apart; without running the network on them."""
        sizes = None if pixel_mask is None else image_sizes(pixel_mask)
        every = sizes or [(pixel_values.shape[2], pixel_values.shape[3])] * len(pixel_values)
        return [self._size_table.look_up(size) for size in every]

    def _padded_batch(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        feature_map = self._features(pixel_values)
        mask = nn.functional.interpolate(pixel_mask[:, None].float(), size=feature_map.shape[-2:])[:, 0] > 0.5
        return feature_map, mask

    def _by_size(self, pixel_values: Tensor, sizes: list[tuple[int, int]]) -> tuple[Tensor, Tensor | None]:
        groups: dict[tuple[int, int], list[int]] = {}
        for index, size in enumerate(sizes):
            groups.setdefault(size, []).append(index)
        if len(groups) == 1:
            height, width = sizes[0]
            return self._features(pixel_values[:, :, :height, :width]), None
        maps = {
            (height, width): self._features(pixel_values[indices, :, :height, :width])
            for (height, width), indices in groups.items()
        }
        rows = max(features.shape[2] for features in maps.values())
        columns = max(features.shape[3] for features in maps.values())
        some = next(iter(maps.values()))
        feature_map = torch.empty(
            (len(sizes), self.channels, rows, columns),
            dtype=some.dtype,
            device=some.device,
            memory_format=torch.channels_last,  # the transformer reads cell by cell
        ).zero_()
        mask = torch.zeros(len(sizes), rows, columns, dtype=torch.bool, device=some.device)
        for size, indices in groups.items():
            _, _, height, width = maps[size].shape
            feature_map[indices, :, :height, :width] = maps[size]
            mask[indices, :height, :width] = True
        return feature_map, None if len({features.shape[2:] for features in maps.values()}) == 1 else mask


def image_sizes(pixel_mask: Tensor) -> list[tuple[int, int]] | None:
    """(height, width) of each image, or None if some mask is not one rectangle at the top left. One transfer from
    the device."""
    mask = pixel_mask.bool()
    heights, widths = mask[:, :, 0].sum(1), mask[:, 0, :].sum(1)
    in_rows = torch.arange(mask.shape[1], device=mask.device) < heights[:, None]
    in_columns = torch.arange(mask.shape[2], device=mask.device) < widths[:, None]
    is_rectangle = (mask == (in_rows[:, :, None] & in_columns[:, None, :])).flatten(1).all(1) & (heights > 0)
    table = torch.stack((heights, widths, is_rectangle), dim=1).tolist()
    return [(height, width) for height, width, _ in table] if all(row[2] for row in table) else None
