"""Step 4: the decoders by name. A new one is a file beside this and an entry here."""

from .anchor_decoder import AnchorDecoder
from .conditional_decoder import ConditionalDecoder
from .configuration_hf_detr import DetrConfig
from .dab_decoder import DabDecoder
from .decoder import Decoder, DetrDecoder

DECODERS: dict[str, type[DetrDecoder]] = {
    "learned": Decoder,
    "anchor": AnchorDecoder,
    "conditional": ConditionalDecoder,
    "dab": DabDecoder,
}


def decoder_class(config: DetrConfig) -> type[DetrDecoder]:
    """The decoder that `config.query_type` names.

    Raises:
        ValueError: there is none of that name.
    """
    if config.query_type not in DECODERS:
        raise ValueError(f"`query_type` must be one of {', '.join(DECODERS)}, got {config.query_type!r}.")
    return DECODERS[config.query_type]
