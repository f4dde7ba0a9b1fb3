"""`accelerate.utils.bnb`: quantized weights of bitsandbytes, which polyaccel does not make. Each name says what does."""

from __future__ import annotations

from typing import Any, NoReturn

from polyaccel.errors import UnsupportedError

_HINT = (
    "load the model with transformers' from_pretrained(quantization_config=BitsAndBytesConfig(...)), which needs no help of ours; or"
    " quantize it with torchao; or keep its weights in float8 with polyaccel.big_models.attach_layerwise_casting_hooks"
)


class BnbQuantizationConfig:
    """Refused when it is made."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise UnsupportedError("BnbQuantizationConfig: polyaccel quantizes nothing with bitsandbytes", _HINT)


def load_and_quantize_model(*args: Any, **kwargs: Any) -> NoReturn:
    """Raises UnsupportedError."""
    raise UnsupportedError("load_and_quantize_model: polyaccel quantizes nothing with bitsandbytes", _HINT)


__all__ = ["BnbQuantizationConfig", "load_and_quantize_model"]
