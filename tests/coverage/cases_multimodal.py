"""Models of transformers for images and text, or sound and text, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from architecture_case import Batch, Case, own_loss, without_dropout
from cases_vision import made

VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32, "patch_size": 8,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 100,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
IMAGE_TOKEN = 99


def pairs(step: int) -> Batch:
    """Images and their captions, as many of each."""
    return {"input_ids": torch.randint(5, 90, (4, 10)), "pixel_values": torch.randn(4, 3, 32, 32)}


def contrasted(step: int) -> Batch:
    """Pairs for a contrastive loss of the model's own."""
    return pairs(step) | {"return_loss": torch.ones(1, dtype=torch.bool)}


def matched(outputs: Any, batch: Batch) -> torch.Tensor:
    """Image i belongs to caption i, both ways."""
    logits = outputs.logits_per_image
    labels = torch.arange(logits.shape[0])
    return F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)


def seen_and_told(step: int) -> Batch:
    """A text with one image: its 16 patches stand as 16 special tokens at the front."""
    ids = torch.cat([torch.full((2, 16), IMAGE_TOKEN), torch.randint(5, 90, (2, 8))], 1)
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(2, 3, 32, 32),
        "labels": ids.masked_fill(ids == IMAGE_TOKEN, -100),
    }


def _llava() -> Any:
    text = transformers.LlamaConfig(**TEXT)
    vision = transformers.CLIPVisionConfig(**VISION)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, vision_feature_select_strategy="default"
    )
    return transformers.LlavaForConditionalGeneration(without_dropout(config))


def _pair(head: str, config: str, **settings: Any) -> Callable[[], Any]:
    return made(head, config, text_config=dict(TEXT), vision_config=dict(VISION), **settings)


def _case(
    name: str,
    build: Callable[[], Any],
    batch: Callable[[int], Batch] = pairs,
    loss: Callable[[Any, Batch], torch.Tensor] = matched,
    note: str = "",
) -> Case:
    return Case(name, "multimodal", build, batch, loss, note)


def vision_and_question(step: int) -> Batch:
    """Images, questions, and one of five answers."""
    return pairs(step) | {"labels": F.one_hot(torch.randint(0, 5, (4,)), 5).float()}


CASES = (
    _case("CLIP", _pair("CLIPModel", "CLIPConfig", projection_dim=16)),
    _case("SigLIP", _pair("SiglipModel", "SiglipConfig")),
    _case("SigLIP 2", _pair("SiglipModel", "SiglipConfig", attn_implementation="eager"), note="eager attention"),
    _case("AltCLIP", _pair("AltCLIPModel", "AltCLIPConfig", projection_dim=16)),
    _case("ChineseCLIP", _pair("ChineseCLIPModel", "ChineseCLIPConfig", projection_dim=16)),
    _case("GroupViT text and CLIPSeg", _pair("CLIPSegModel", "CLIPSegConfig", projection_dim=16)),
    _case("BLIP (retrieval)", _pair("BlipModel", "BlipConfig", projection_dim=16)),
    _case("BLIP (captions)", _pair("BlipForConditionalGeneration", "BlipConfig", projection_dim=16),
          lambda step: (lambda b: b | {"labels": b["input_ids"]})(pairs(step)), own_loss),
    _case("ViLT", made("ViltForQuestionAnswering", "ViltConfig", **VISION | TEXT, num_labels=5, type_vocab_size=2),
          vision_and_question, own_loss, "chooses patches at random among those that the mask leaves, at a shape that depends on it"),
    _case("LLaVA", _llava, seen_and_told, own_loss),
    _case("GIT", lambda: transformers.GitForCausalLM(without_dropout(transformers.GitConfig(vision_config=dict(VISION), **TEXT))),
          lambda step: (lambda b: b | {"labels": b["input_ids"]})(pairs(step)), own_loss),
    _case("VisionEncoderDecoder (ViT and BERT)", lambda: transformers.VisionEncoderDecoderModel(
        transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
            without_dropout(transformers.ViTConfig(**VISION)), without_dropout(transformers.BertConfig(**TEXT)),
            decoder_start_token_id=1, pad_token_id=0)),
          lambda step: {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.randint(5, 90, (2, 8))}, own_loss),
)  # fmt: skip
