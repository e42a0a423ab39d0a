"""Step 4: the decoders by name. A new one is a file beside this and an entry here."""

from collections.abc import Callable

from .anchor_decoder import AnchorDecoder
from .configuration_hf_detr import DetrConfig
from .decoder import Decoder, DetrDecoder
from .encoder import LayerOptions

DECODERS: dict[str, Callable[[DetrConfig, LayerOptions], DetrDecoder]] = {
    "learned": lambda config, layer: Decoder(config.decoder_layers, layer),
    "anchor": lambda config, layer: AnchorDecoder(
        config.decoder_layers,
        layer,
        modulate_attention=config.modulate_attention,
        relative_boxes=config.relative_boxes,
    ),
}


def build_decoder(config: DetrConfig, layer: LayerOptions) -> DetrDecoder:
    """The decoder that `config.query_type` names.

    Raises:
        ValueError: there is none of that name.
    """
    if config.query_type not in DECODERS:
        raise ValueError(f"`query_type` must be one of {', '.join(DECODERS)}, got {config.query_type!r}.")
    return DECODERS[config.query_type](config, layer)
