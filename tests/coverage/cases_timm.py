"""Image models of timm with random weights: its own factories and classes, made small by their own arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from architecture_case import Batch, Case
from torch import nn

LABELS = 5


def made(model: str, **settings: Any) -> Callable[[], nn.Module]:
    """A function that makes `timm.create_model(model, **settings)`."""

    def build() -> nn.Module:
        import timm

        return timm.create_model(model, pretrained=False, num_classes=LABELS, **settings)

    return build


def run_once(build: Callable[[], nn.Module], size: int) -> Callable[[], nn.Module]:
    """The same model after one forward, which makes tables in the image's own size."""

    def build_and_run() -> nn.Module:
        model = build()
        with torch.no_grad():
            model.eval()(torch.randn(1, 3, size, size))
        return model

    return build_and_run


def class_in_order(outputs: Any, batch: Batch) -> torch.Tensor:
    """Image i is of class i; a model with two heads gets the sum of both losses."""
    heads = outputs if isinstance(outputs, tuple | list) else (outputs,)
    labels = torch.arange(heads[0].shape[0]) % LABELS
    return torch.stack([F.cross_entropy(logits, labels) for logits in heads]).sum()


def _case(model: str, size: int = 64, batch: int = 4, note: str = "", **settings: Any) -> Case:
    return Case(
        f"timm {model}",
        "timm",
        made(model, **settings),
        lambda step: {"x": torch.randn(batch, 3, size, size)},
        class_in_order,
        note,
        needs=("timm",),
    )


def _class_case(name: str, path: str, **settings: Any) -> Case:
    """A class of timm.models by its path; so are the layers among its settings."""

    def build() -> nn.Module:
        import timm.models

        def found(value: str) -> Any:
            return attrgetter(value)(timm.models)

        layers = {key: found(value) if key.endswith("_layer") else value for key, value in settings.items()}
        return found(path)(num_classes=LABELS, **layers)

    size = settings.get("img_size", 64)
    return Case(
        f"timm {name}",
        "timm",
        build,
        lambda step: {"x": torch.randn(4, 3, size, size)},
        class_in_order,
        needs=("timm",),
    )


TINY_MIXER: dict[str, Any] = {"img_size": 32, "patch_size": 8, "num_blocks": 2, "embed_dim": 32}
TINY_VIT: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": 32, "patch_size": 8}
TINY_CONVIT: dict[str, Any] = TINY_VIT | {"depth": 3, "local_up_to_layer": 2}
ONE_EACH = (1, 1, 1, 1)
WIDTHS = (8, 16, 24, 32)

CASES = (
    # residual and plain convolutional networks
    _case("resnet18", layers=ONE_EACH, channels=WIDTHS),
    _case("resnet50", layers=ONE_EACH, channels=WIDTHS),
    _case("resnet50d", layers=ONE_EACH, channels=WIDTHS),
    _case("resnext50_32x4d", layers=ONE_EACH, cardinality=4),
    _case("seresnet50", layers=ONE_EACH, channels=WIDTHS),
    _case("resnest14d"),
    _case("resnetv2_50", layers=ONE_EACH, channels=(32, 32, 64, 64)),
    _case("resnetv2_50x1_bit", note="standardized weights, group norm"),
    _case("res2net50_26w_4s", layers=ONE_EACH),
    _case("skresnet18", layers=ONE_EACH),
    _case("ecaresnet50d", layers=ONE_EACH),
    _case("resnetblur50", layers=ONE_EACH, note="blurred strides: depthwise convolutions with a constant kernel"),
    _case("regnetx_002"),
    _case("regnety_002"),
    _case("densenet121", block_config=(2, 2, 2, 2), growth_rate=8),
    _case("vgg11"),
    _case("inception_v3", size=96, batch=4),
    _case("xception41", size=64),
    _case("dla34"),
    _case("dpn48b"),
    _case("hrnet_w18_small"),
    _case("cspresnet50"),
    _case("darknet53"),
    _case("selecsls42"),
    _case("vovnet39a"),
    _case("hardcorenas_a"),
    _case("ghostnet_050", drop_rate=0.0),
    _case("mobilenetv2_035"),
    _case("mobilenetv3_small_050"),
    _case("mobilenetv4_conv_small_035"),
    _case("mnasnet_small"),
    _case("fbnetc_100"),
    _case("efficientnet_b0"),
    _case("tinynet_e"),
    _case("lcnet_035"),
    _case("repvgg_a0"),
    _case("mobileone_s0"),
    _case("fastvit_t8"),
    _case("nfnet_l0"),
    _case("dm_nfnet_f0"),
    _case("convnext_atto", depths=ONE_EACH, dims=WIDTHS),
    _case("convnextv2_atto", depths=ONE_EACH, dims=WIDTHS),
    _case("inception_next_tiny", depths=ONE_EACH, dims=(16, 32, 48, 64)),
    _case("edgenext_xx_small", size=64),
    _case("rexnet_100", drop_rate=0.0, drop_path_rate=0.0),
    _case("starnet_s1"),
    _case("visformer_tiny", img_size=64),
    # attention over patches
    _case("vit_tiny_patch16_224", size=32, **TINY_VIT),
    _case("vit_relpos_small_patch16_224", size=32, **TINY_VIT),
    _case("vit_small_patch14_reg4_dinov2", size=32, **TINY_VIT),
    _case("deit_tiny_distilled_patch16_224", size=32, **TINY_VIT, note="its two heads are trained by the sum of their losses"),
    _case("deit3_small_patch16_224", size=32, **TINY_VIT),
    _case("beit_base_patch16_224", size=32, **TINY_VIT),
    _case("beitv2_base_patch16_224", size=32, **TINY_VIT),
    _case("eva02_tiny_patch14_224", size=32, **TINY_VIT),
    _case("cait_xxs24_224", size=32, **TINY_VIT),
    _case("xcit_nano_12_p16_224", size=64, img_size=64, depth=2, embed_dim=32),
    _case("swin_tiny_patch4_window7_224", drop_path_rate=0.0,
          size=64, img_size=64, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)),
    _case("swinv2_tiny_window8_256", size=64, img_size=64, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)),
    _case("swin_s3_tiny_224", drop_path_rate=0.0,
          size=64, img_size=64, window_size=(4, 4, 4, 2), embed_dim=16, depths=(2, 2, 2, 2), num_heads=(2, 2, 4, 4)),
    _case("pvt_v2_b0", depths=ONE_EACH),
    _case("twins_svt_small", size=64, img_size=64, embed_dims=(16, 32, 48, 64), num_heads=(2, 2, 4, 4), depths=ONE_EACH),
    _case("crossvit_tiny_240", size=240, batch=2, embed_dim=(16, 32), num_heads=(2, 2)),
    _case("coatnet_nano_rw_224", size=64, img_size=64, depths=ONE_EACH, embed_dim=(16, 32, 32, 64), stem_width=(8, 16)),
    _case("tnt_s_patch16_224", size=32, img_size=32, embed_dim=32, inner_dim=8, depth=2, num_heads_outer=4, num_heads_inner=2),
    replace(
        _case("convit_tiny", size=32, note="run once before it is prepared: its first forward gives a buffer another shape", **TINY_CONVIT),
        build=run_once(made("convit_tiny", **TINY_CONVIT), 32),
    ),
    _case("levit_128s", size=64, img_size=64, embed_dim=(32, 48, 64), num_heads=(2, 3, 4), depth=(1, 1, 1)),
    _case("efficientformer_l1", depths=(1, 1, 1, 2), embed_dims=(16, 16, 32, 32), size=224, batch=2),
    _case("efficientformerv2_s0", size=64, img_size=64, depths=(1, 1, 1, 2), embed_dims=(16, 16, 32, 32)),
    _case("efficientvit_b0"),
    _case("efficientvit_m0", size=64, img_size=64),
    _case("mobilevit_xxs", size=64),
    _case("mobilevitv2_050", size=64),
    _case("hiera_tiny_224", size=64, img_size=(64, 64), embed_dim=16, num_heads=1, stages=ONE_EACH),
    _case("repvit_m1"),
    _case("sequencer2d_s", size=64, img_size=64, layers=(1, 1, 1, 1), embed_dims=(16, 16, 16, 16), hidden_sizes=(8, 8, 8, 8),
          note="bidirectional LSTMs over rows and columns"),
    _class_case("volo", "volo.VOLO",
                img_size=64, layers=ONE_EACH, embed_dims=(16, 32, 32, 32), num_heads=(2, 4, 4, 4), use_mix_token=False),
    _class_case("coat", "coat.CoaT", img_size=64, patch_size=4, embed_dims=(16, 16, 16, 16), serial_depths=ONE_EACH, parallel_depth=1,
                num_heads=8, mlp_ratios=(2, 2, 2, 2)),
    _class_case("tiny_vit", "tiny_vit.TinyVit", embed_dims=(16, 32, 32, 64), depths=ONE_EACH, num_heads=(2, 2, 2, 4),
                window_sizes=(4, 4, 4, 2), drop_path_rate=0.0),
    _class_case("pit", "pit.PoolingVisionTransformer", img_size=64, patch_size=8, stride=4, base_dims=(8, 8, 8), stem_type="overlap",
                depth=(1, 1, 1), heads=(2, 2, 4), mlp_ratio=2),
    _class_case("nest", "nest.Nest", img_size=64, embed_dims=(16, 32, 32), num_heads=(2, 2, 2), depths=(1, 1, 1), drop_path_rate=0.0),
    _class_case("poolformer", "metaformer.MetaFormer", depths=ONE_EACH, dims=WIDTHS),
    _class_case("focalnet", "focalnet.FocalNet", drop_path_rate=0.0, depths=(1, 1), embed_dim=16,
                focal_levels=(2, 2), focal_windows=(3, 3)),
    _case("maxvit_pico_rw_256", img_size=64, depths=ONE_EACH, embed_dim=(32, 32, 64, 64), stem_width=(8, 16)),
    _case("maxxvitv2_nano_rw_256", img_size=64, depths=ONE_EACH, embed_dim=(32, 32, 64, 64), stem_width=(8, 16)),
    _case("mvitv2_tiny", img_size=64),
    # multilayer perceptrons over patches
    _class_case("mixer", "mlp_mixer.MlpMixer", **TINY_MIXER),
    # others of industry
    _case("tresnet_m"),
    _case("hgnet_tiny"),
    _case("hgnetv2_b0"),
)  # fmt: skip
