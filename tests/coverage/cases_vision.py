"""Vision models of transformers with random weights: classification, segmentation, depth, detection, masked images, backbones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from architecture_case import Batch, Case, own_loss, without_dropout
from torch import nn

LABELS = 5
LAYERS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
VIT: dict[str, Any] = LAYERS | {"image_size": 32, "patch_size": 8, "num_labels": LABELS}
FOUR_LAYERS: dict[str, Any] = VIT | {"num_hidden_layers": 4}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "num_labels": LABELS}
PYRAMID: dict[str, Any] = STAGES | {"num_attention_heads": [1, 2, 2, 4]}
SWIN: dict[str, Any] = {
    "image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": LABELS,
}  # fmt: skip
ALL_STAGES = ["stage1", "stage2", "stage3", "stage4"]
DETECTION: dict[str, Any] = {
    "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "d_model": 32, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "num_queries": 5, "num_labels": LABELS,
}  # fmt: skip
MATCHING = "a loss of our own: the built-in one matches boxes to targets with scipy, by value and outside torch"


def made(head: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    """A function that makes `transformers.<head>` from `transformers.<config>(**settings)` without dropout."""

    def build() -> nn.Module:
        return getattr(transformers, head)(without_dropout(getattr(transformers, config)(**settings)))

    return build


def images(size: int = 32, batch: int = 4) -> Callable[[int], Batch]:
    """Images (batch, 3, size, size) with a class each."""
    return lambda step: {
        "pixel_values": torch.randn(batch, 3, size, size),
        "labels": torch.randint(0, LABELS, (batch,)),
    }


def only_images(size: int = 32, batch: int = 4) -> Callable[[int], Batch]:
    """Images without labels, for models whose loss is not their own."""
    return lambda step: {"pixel_values": torch.randn(batch, 3, size, size)}


def pixel_labels(size: int) -> Callable[[int], Batch]:
    """Images with a class for every pixel."""
    return lambda step: {
        "pixel_values": torch.randn(4, 3, size, size),
        "labels": torch.randint(0, LABELS, (4, size, size)),
    }


def depth_to_one(outputs: Any, batch: Batch) -> torch.Tensor:
    """Predict a depth of 1 everywhere."""
    return F.mse_loss(outputs.predicted_depth, torch.ones_like(outputs.predicted_depth))


def boxes_in_order(outputs: Any, batch: Batch) -> torch.Tensor:
    """Query i is to find class i in the middle of the image."""
    queries = torch.arange(outputs.logits.shape[1]) % LABELS
    found = F.cross_entropy(outputs.logits.transpose(1, 2), queries.expand(outputs.logits.shape[:2]))
    return found + (outputs.pred_boxes - 0.5).abs().mean()


def masks_in_order(outputs: Any, batch: Batch) -> torch.Tensor:
    """Query i is to find class i, and to cover the image."""
    logits = outputs.class_queries_logits
    queries = (torch.arange(logits.shape[1]) % LABELS).expand(logits.shape[:2])
    covered = outputs.masks_queries_logits
    return F.cross_entropy(logits.transpose(1, 2), queries) + F.binary_cross_entropy_with_logits(
        covered, torch.ones_like(covered)
    )


def feature_maps(outputs: Any, batch: Batch) -> torch.Tensor:
    """Bring the mean square of every feature map to 1."""
    return torch.stack([(found.square().mean() - 1).square() for found in outputs.feature_maps]).sum()


def last_hidden(outputs: Any, batch: Batch) -> torch.Tensor:
    """Bring the mean of the last hidden state to 1."""
    return (outputs.last_hidden_state.mean() - 1).square() + outputs.last_hidden_state.square().mean()


def _case(
    name: str,
    build: Callable[[], nn.Module],
    batch: Callable[[int], Batch] | None = None,
    loss: Callable[[Any, Batch], torch.Tensor] = own_loss,
    note: str = "",
) -> Case:
    return Case(name, "vision", build, batch or images(), loss, note)


def classifier(name: str, config: str | None = None, **settings: Any) -> Callable[[], nn.Module]:
    """`transformers.<name>ForImageClassification`."""
    return made(f"{name}ForImageClassification", config or f"{name}Config", **({"num_labels": LABELS} | settings))


CASES = (
    # attention over patches
    _case("ViT", classifier("ViT", **VIT)),
    _case("ViT (eager attention)", classifier("ViT", **VIT, attn_implementation="eager")),
    _case("DeiT", classifier("DeiT", **VIT)),
    _case("DeiT (distilled)", made("DeiTForImageClassificationWithTeacher", "DeiTConfig", **VIT), only_images(),
          lambda outputs, batch: outputs.logits.logsumexp(-1).mean()),
    _case("BEiT", classifier("Beit", **VIT, use_relative_position_bias=True)),
    _case(
        "BEiT (segmentation)",
        made("BeitForSemanticSegmentation", "BeitConfig", **FOUR_LAYERS | {"image_size": 64, "patch_size": 16}, out_indices=[1, 2, 3, 4]),
        pixel_labels(64),
    ),
    _case("Data2VecVision", classifier("Data2VecVision", **VIT)),
    _case("DINOv2", classifier("Dinov2", **VIT), images(48), note="48-pixel images: position embeddings are interpolated (bicubic)"),
    _case("DINOv2 with registers", classifier("Dinov2WithRegisters", **VIT)),
    _case("DINOv3 ViT", made("DINOv3ViTModel", "DINOv3ViTConfig", **VIT, pos_embed_rescale=None), only_images(), last_hidden),
    _case("I-JEPA", classifier("IJepa", **VIT)),
    _case("ViT-MSN", classifier("ViTMSN", **VIT)),
    _case("Hiera", classifier("Hiera", image_size=[64, 64], patch_size=[7, 7], patch_stride=[4, 4], patch_padding=[3, 3], embed_dim=16,
                              depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4], masked_unit_size=[8, 8]), images(64)),
    _case("Swin", classifier("Swin", **SWIN)),
    _case("Swinv2", classifier("Swinv2", **SWIN)),
    _case("Swin backbone", made("SwinBackbone", "SwinConfig", **SWIN, out_features=["stage1", "stage2"]), only_images(), feature_maps),
    _case("Donut Swin", made("DonutSwinModel", "DonutSwinConfig", **SWIN), only_images(), last_hidden),
    _case("Swin2SR", made("Swin2SRForImageSuperResolution", "Swin2SRConfig", image_size=16, embed_dim=16, depths=[1, 1],
                          num_heads=[2, 2], window_size=4, upscale=2), only_images(16),
          lambda outputs, batch: F.l1_loss(outputs.reconstruction, F.interpolate(batch["pixel_values"], scale_factor=2))),
    _case("ViTDet backbone", made("VitDetBackbone", "VitDetConfig", hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                  image_size=32, patch_size=8, window_size=2, window_block_indices=[0],
                                  use_relative_position_embeddings=True), only_images(), feature_maps),
    _case("PVT", classifier("Pvt", **PYRAMID, image_size=64, sequence_reduction_ratios=[4, 2, 2, 1], mlp_ratios=[2, 2, 2, 2]), images(64)),
    _case("PVTv2", classifier("PvtV2", **PYRAMID, image_size=64, sr_ratios=[4, 2, 2, 1], mlp_ratios=[2, 2, 2, 2]), images(64)),
    _case("LeViT", classifier("Levit", image_size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[1, 1, 1],
                              key_dim=[8, 8, 8]), images(64, 8)),
    _case("CvT", classifier("Cvt", embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 2, 3], drop_rate=[0.0] * 3,
                            attention_drop_rate=[0.0] * 3, drop_path_rate=[0.0] * 3,
                            cls_token=[False, False, True], mlp_ratio=[2.0] * 3, qkv_bias=[True] * 3), images(64)),
    _case("SwiftFormer", classifier("SwiftFormer", image_size=64, depths=[1, 1, 1, 1], embed_dims=[8, 16, 24, 32]),
          images(64, 8)),
    _case("Timesformer", made("TimesformerForVideoClassification", "TimesformerConfig", **VIT, num_frames=2),
          lambda step: {"pixel_values": torch.randn(2, 2, 3, 32, 32), "labels": torch.randint(0, LABELS, (2,))}),
    _case("VideoMAE", made("VideoMAEForVideoClassification", "VideoMAEConfig", **VIT, num_frames=4),
          lambda step: {"pixel_values": torch.randn(2, 4, 3, 32, 32), "labels": torch.randint(0, LABELS, (2,))}),
    _case("ViViT", made("VivitForVideoClassification", "VivitConfig", **LAYERS, image_size=32, num_frames=4, tubelet_size=[2, 8, 8],
                        num_labels=LABELS),
          lambda step: {"pixel_values": torch.randn(2, 4, 3, 32, 32), "labels": torch.randint(0, LABELS, (2,))}),
    _case("ImageGPT", made("ImageGPTForCausalImageModeling", "ImageGPTConfig", n_embd=32, n_layer=2, n_head=4, vocab_size=65,
                           n_positions=64),
          lambda step: dict.fromkeys(("input_ids", "labels"), torch.randint(0, 64, (4, 24)))),
    # convolutions
    _case("ConvNeXt", classifier("ConvNext", **STAGES)),
    _case("ConvNeXtV2", classifier("ConvNextV2", **STAGES)),
    _case("ResNet", classifier("ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2])),
    _case("ResNet (basic layers)", classifier("ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic")),
    _case("RegNet", classifier("RegNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8)),
    _case("BiT", classifier("Bit", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], num_groups=4)),
    _case("MobileNetV1", classifier("MobileNetV1", depth_multiplier=0.25), images(64, 8)),
    _case("MobileNetV2", classifier("MobileNetV2", depth_multiplier=0.25), images(64, 8)),
    _case("MobileViT", classifier("MobileViT", hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 16, 16, 24, 32, 32, 64], image_size=64,
                                  num_attention_heads=2), images(64)),
    _case("MobileViTV2", classifier("MobileViTV2", width_multiplier=0.25, image_size=64, base_attn_unit_dims=[16, 24, 32],
                                    n_attn_blocks=[1, 1, 1]), images(64)),
    _case("EfficientNet", classifier("EfficientNet", width_coefficient=0.25, depth_coefficient=0.4, hidden_dim=320, image_size=64),
          images(64)),
    _case("PoolFormer", classifier("PoolFormer", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1]), images(64)),
    _case("FocalNet", classifier("FocalNet", image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], focal_levels=[2, 2],
                                 focal_windows=[3, 3], hidden_sizes=[16, 32])),
    _case("TextNet", classifier("TextNet", stem_out_channels=8, hidden_sizes=[8, 16, 16, 24, 32]), images(64)),
    # dense prediction
    _case("SegFormer", made("SegformerForSemanticSegmentation", "SegformerConfig", **PYRAMID, decoder_hidden_size=32), pixel_labels(64)),
    _case("SegFormer (classification)", classifier("Segformer", **PYRAMID), images(64)),
    _case("UperNet", lambda: transformers.UperNetForSemanticSegmentation(transformers.UperNetConfig(
        backbone_config=transformers.ConvNextConfig(**STAGES, out_features=ALL_STAGES), hidden_size=16, auxiliary_in_channels=24,
        auxiliary_channels=16, num_labels=LABELS)), pixel_labels(64)),
    _case("MobileViT (segmentation)", made(
        "MobileViTForSemanticSegmentation", "MobileViTConfig", hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 16, 16, 24, 32, 32, 64],
        image_size=64, num_attention_heads=2, aspp_out_channels=16, num_labels=LABELS), pixel_labels(64)),
    replace(_case("MobileNetV2 (segmentation)", made("MobileNetV2ForSemanticSegmentation", "MobileNetV2Config", depth_multiplier=0.25,
                                                     num_labels=LABELS), pixel_labels(64),
                  note="8 steps: each multiplies a difference by about four, in float64 too"), steps=8),
    _case("DPT (depth)", made("DPTForDepthEstimation", "DPTConfig", **FOUR_LAYERS, backbone_out_indices=[0, 1, 2, 3],
                              neck_hidden_sizes=[8, 16, 16, 16], fusion_hidden_size=16, is_hybrid=False), only_images(), depth_to_one),
    _case("DPT (segmentation)", made("DPTForSemanticSegmentation", "DPTConfig", **FOUR_LAYERS, backbone_out_indices=[0, 1, 2, 3],
                                     neck_hidden_sizes=[8, 16, 16, 16], fusion_hidden_size=16), pixel_labels(32)),
    _case("Depth Anything", lambda: transformers.DepthAnythingForDepthEstimation(transformers.DepthAnythingConfig(
        backbone_config=without_dropout(transformers.Dinov2Config(
            **FOUR_LAYERS | {"image_size": 56, "patch_size": 14}, out_features=ALL_STAGES, reshape_hidden_states=False)),
        reassemble_hidden_size=32, neck_hidden_sizes=[8, 16, 16, 16], fusion_hidden_size=16)), only_images(56), depth_to_one),
    _case("GLPN", made("GLPNForDepthEstimation", "GLPNConfig", **PYRAMID, decoder_hidden_size=16), only_images(64), depth_to_one),
    _case("YOLOS", made("YolosForObjectDetection", "YolosConfig", **VIT | {"image_size": [32, 32]}, num_detection_tokens=5), only_images(),
          boxes_in_order, MATCHING),
    _case("DETR", lambda: transformers.DetrForObjectDetection(without_dropout(transformers.DetrConfig(
        backbone_config=transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1],
                                                  out_features=["stage4"]), **DETECTION))), only_images(64), boxes_in_order, MATCHING),
    _case("Conditional DETR", lambda: transformers.ConditionalDetrForObjectDetection(without_dropout(transformers.ConditionalDetrConfig(
        backbone_config=transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32, 32, 32], depths=[1, 1, 1, 1],
                                                  out_features=["stage4"]), **DETECTION))), only_images(64), boxes_in_order, MATCHING),
    _case("MaskFormer", lambda: transformers.MaskFormerForInstanceSegmentation(transformers.MaskFormerConfig(
        backbone_config=without_dropout(transformers.SwinConfig(**SWIN | {"image_size": 64, "depths": [1, 1, 1, 1],
                                                                          "num_heads": [2, 2, 4, 4]}, out_features=ALL_STAGES)),
        decoder_config=without_dropout(transformers.DetrConfig(**DETECTION)), fpn_feature_size=32, mask_feature_size=32,
        num_labels=LABELS)), only_images(64), masks_in_order, MATCHING),
    # self-supervised
    _case("ViTMAE", made("ViTMAEForPreTraining", "ViTMAEConfig", **LAYERS, image_size=32, patch_size=8, mask_ratio=0.5,
                         decoder_num_attention_heads=4, decoder_hidden_size=32, decoder_num_hidden_layers=1,
                         decoder_intermediate_size=64),
          lambda step: {"pixel_values": torch.randn(4, 3, 32, 32), "noise": torch.rand(4, 16)}, note="the noise of its mask is an input"),
    _case("ViT (masked images)", made("ViTForMaskedImageModeling", "ViTConfig", **VIT, encoder_stride=8),
          lambda step: {"pixel_values": torch.randn(4, 3, 32, 32), "bool_masked_pos": torch.rand(4, 16) < 0.5}),
    _case("BEiT (masked images)", made("BeitForMaskedImageModeling", "BeitConfig", **VIT, vocab_size=50), only_images(),
          lambda outputs, batch: F.cross_entropy(outputs.logits.flatten(0, 1), torch.arange(outputs.logits.shape[:2].numel()) % 50)),
)  # fmt: skip
