"""Tiny models of the vision families of transformers, with rough weights, and the README's line on each family."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AlignModel, AutoBackbone, AutoConfig, AutoModel, PreTrainedModel

from tests.helpers.tiny import scrambled

VIT = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
PLAIN = {**VIT, "intermediate_size": 64}
PAIRS = {**VIT, "image_size": [32, 32], "patch_size": [8, 8]}
NAFLEX = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 64, "patch_size": 8}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 2, 2], "num_heads": [1, 2, 2]}
STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 8, 16, 24]}
PYRAMID = {**STAGES, "num_attention_heads": [1, 1, 2, 2], "mlp_ratios": [2, 2, 2, 2]}
TEXT = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 99}
BOTH = {"text_config": TEXT, "vision_config": PLAIN}
LANGUAGE = {**TEXT, "num_key_value_heads": 1, "head_dim": 16}
SIGLIP = {"model_type": "siglip_vision_model", **PLAIN}
EFFICIENTNET = {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}
DETR = {"backbone_config": {"model_type": "resnet", "embedding_size": 8, **STAGES}}
VIDEO = {**PLAIN, "num_frames": 2}


@torch.no_grad()
def roughened(model: PreTrainedModel) -> PreTrainedModel:
    """The model in eval mode with every parameter moved. Its batch norms know the statistics of random images.

    Without these, the tiny layers shrink an image to nothing, and all images have the same features.
    """
    scrambled(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    trunk = model.vision_model if isinstance(model, AlignModel) else model
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        trunk(torch.randn(8, 3, 128, 128, generator=torch.Generator().manual_seed(0)))
    return model.eval()


@dataclass(frozen=True)
class Member:
    """A model type of a family, and how to build a tiny model of it.

    Attributes:
        model_type: as transformers calls it.
        config: what its config is told.
        model: the class to build; what AutoModel loads if None.
        remedy: what the config has to be told besides.
    """

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    model: str | None = None
    remedy: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.model or self.model_type

    def build(self, **more: Any) -> PreTrainedModel:
        """A tiny model with rough weights."""
        torch.manual_seed(0)
        config = AutoConfig.for_model(self.model_type, **{**self.config, **more})
        if self.model is None:
            return roughened(AutoModel.from_config(config))
        if self.model == "AutoBackbone":
            return roughened(AutoBackbone.from_config(config))
        return roughened(getattr(transformers, self.model)(config))


@dataclass(frozen=True)
class Family:
    """A line of the table on models that work.

    Attributes:
        name: as the README calls it.
        members: its model types.
        cut: from which block on the frozen part can be run apart, "any", "last" or "none". Without it, the whole model
            is run again and again.
        spaces: what can be generated.
        needs: what has to be done first.
    """

    name: str
    members: tuple[Member, ...]
    cut: str = "any"
    spaces: tuple[str, ...] = ("biases", "LoRA", "norms")
    needs: str = ""


@dataclass(frozen=True)
class Refused:
    """A line of the table on models that do not work.

    Attributes:
        name: as the README calls it.
        because: why.
        members: its model types, which are built and tried.
        error: what the gate says, in part.
        untried: further model types, of which no tiny model can be built here.
    """

    name: str
    because: str
    members: tuple[Member, ...] = ()
    error: str = ""
    untried: tuple[str, ...] = ()


CONVOLUTIONS = ("LoRA", "norms")

FAMILIES = (
    Family("ViT, DeiT, ViT-MSN", (Member("vit", PLAIN), Member("deit", PLAIN), Member("vit_msn", PLAIN))),
    Family("ViT-MAE", (Member("vit_mae", PLAIN, remedy={"mask_ratio": 0.0}),), needs="`mask_ratio=0` in its config"),
    Family("I-JEPA", (Member("ijepa", PLAIN),)),
    Family("DINOv2, also with registers", (Member("dinov2", VIT), Member("dinov2_with_registers", VIT))),
    Family("DINOv3 (ViT)", (Member("dinov3_vit", PLAIN),)),
    Family("BEiT, Data2Vec", (Member("beit", PLAIN), Member("data2vec-vision", PLAIN))),
    Family("DPT, ViTDet", (Member("dpt", PLAIN), Member("vitdet", {**VIT, "pretrain_image_size": 32}))),
    Family("Pixio, Sapiens 2", (Member("pixio", VIT), Member("sapiens2", VIT))),
    Family(
        "TIPSv2",
        (Member("tipsv2_vision_model", VIT), Member("tipsv2", {"vision_config": VIT, "text_config": TEXT})),
    ),
    Family("InternVL (its vision model)", (Member("internvl_vision", {**PAIRS, "intermediate_size": 64}),)),
    Family(
        "CLIP",
        (Member("clip_vision_model", PLAIN), Member("clip", BOTH), Member("clip", BOTH, "CLIPForImageClassification")),
    ),
    Family(
        "MetaCLIP 2, AltCLIP, Chinese-CLIP, CLIPSeg, MLCD",
        (
            *(Member("metaclip_2", BOTH), Member("altclip", BOTH), Member("chinese_clip", BOTH)),
            *(Member("clipseg", BOTH), Member("mlcd", PLAIN, "MLCDVisionModel"), Member("mlcd_vision_model", PLAIN)),
        ),
    ),
    Family(
        "BLIP, BLIP-2",
        (
            Member("blip", BOTH),
            Member(
                "blip-2",
                {"vision_config": PLAIN, "qformer_config": TEXT, "text_config": {"model_type": "opt"}},
                "Blip2ForImageTextRetrieval",
            ),
        ),
    ),
    Family(
        "SigLIP, also in Cohere 2 Vision and ShieldGemma 2",
        (
            *(Member("siglip_vision_model", PLAIN), Member("siglip", BOTH)),
            Member("siglip", BOTH, "SiglipForImageClassification"),
            Member("cohere2_vision", {"vision_config": SIGLIP, "text_config": {"model_type": "cohere2", **LANGUAGE}}),
            Member(
                "shieldgemma2",
                {"vision_config": SIGLIP, "text_config": {"model_type": "gemma3_text", **LANGUAGE}},
                "ShieldGemma2ForImageClassification",
            ),
        ),
    ),
    Family(
        "SigLIP 2",
        (Member("siglip2", {"text_config": TEXT, "vision_config": {**NAFLEX, "num_patches": 16}}),),
        needs="the image processor of SigLIP, which makes images, not patches",
    ),
    Family("AIMv2", (Member("aimv2_vision_model", PLAIN),)),
    Family(
        "YOLOS",
        (Member("yolos", {**PLAIN, "image_size": [32, 32], "num_detection_tokens": 2}),),
        cut="last",
    ),
    Family(
        "Swin, Swin v2, Donut, MaskFormer-Swin",
        (
            *(Member("swin", {**SWIN, "window_size": 4}), Member("swinv2", {**SWIN, "window_size": 4})),
            Member("swin", {**SWIN, "window_size": 4}, "SwinForImageClassification"),
            *(Member("donut-swin", {**SWIN, "window_size": 4}), Member("maskformer-swin", {**SWIN, "window_size": 4})),
        ),
        cut="last",
    ),
    Family(
        "Swin2SR",
        (
            Member(
                "swin2sr", {"embed_dim": 4, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4, "image_size": 16}
            ),
        ),
        cut="none",
    ),
    Family(
        "FocalNet",
        (Member("focalnet", {"image_size": 64, "embed_dim": 8, "depths": [1, 1, 2, 1]}),),
        cut="last",
    ),
    Family(
        "Hiera",
        (Member("hiera", {"embed_dim": 8, "image_size": [64, 64], "depths": [1, 1, 2, 1], "num_heads": [1, 1, 2, 2]}),),
    ),
    Family(
        "PVT, PVT v2, GLPN",
        (
            Member("pvt", {**PYRAMID, "image_size": 64}),
            Member("pvt_v2", {**PYRAMID, "image_size": 64}),
            Member("glpn", PYRAMID),
        ),
        cut="last",
    ),
    Family("Segformer", (Member("segformer", PYRAMID),)),
    Family("CvT", (Member("cvt", {"embed_dim": [8, 8, 16], "num_heads": [1, 1, 2], "depth": [1, 2, 3]}),)),
    Family(
        "LeViT",
        (
            Member(
                "levit",
                {"image_size": 128, "hidden_sizes": [16, 16, 24], "num_attention_heads": [1, 2, 2]}
                | {"depths": [1, 1, 1], "key_dim": [8, 8, 8]},
            ),
        ),
    ),
    Family(
        "ConvNeXt, ConvNeXt v2, DINOv3 (ConvNeXt)",
        (
            *(Member("convnext", STAGES), Member("convnextv2", STAGES), Member("dinov3_convnext", STAGES)),
            Member("convnext", STAGES, "ConvNextForImageClassification"),
        ),
    ),
    Family(
        "ResNet, RegNet, BiT",
        (
            Member("resnet", {**STAGES, "embedding_size": 8}),
            Member("resnet", {**STAGES, "embedding_size": 8}, "ResNetForImageClassification"),
            Member("regnet", {**STAGES, "embedding_size": 8, "groups_width": 8}),
            Member("bit", {**STAGES, "embedding_size": 8, "num_groups": 4}),
        ),
        spaces=CONVOLUTIONS,
    ),
    Family("EfficientNet", (Member("efficientnet", EFFICIENTNET),), cut="none", spaces=CONVOLUTIONS),
    Family(
        "ALIGN",
        (Member("align", {"text_config": TEXT, "vision_config": EFFICIENTNET}),),
        spaces=CONVOLUTIONS,
    ),
    Family("MobileNet v1", (Member("mobilenet_v1", {"image_size": 64, "depth_multiplier": 0.25}),), spaces=("norms",)),
    Family(
        "MobileNet v2",
        (Member("mobilenet_v2", {"image_size": 64, "depth_multiplier": 0.25}),),
        cut="none",
        spaces=("norms",),
    ),
    Family(
        "MobileViT",
        (
            Member(
                "mobilevit",
                {"image_size": 64, "hidden_sizes": [16, 16, 24], "neck_hidden_sizes": [8, 8, 8, 16, 16, 24, 32]},
            ),
        ),
        cut="none",
    ),
    Family(
        "MobileViT v2",
        (Member("mobilevitv2", {"image_size": 64, "base_attn_unit_dims": [16, 16, 24], "width_multiplier": 0.25}),),
        spaces=CONVOLUTIONS,
    ),
    Family("PoolFormer", (Member("poolformer", STAGES),), cut="last", spaces=CONVOLUTIONS),
    Family(
        "SwiftFormer",
        (Member("swiftformer", {"image_size": 64, "depths": [1, 1, 2, 1], "embed_dims": [8, 8, 16, 24]}),),
    ),
    Family("TextNet", (Member("textnet", {"image_size": [64, 64]}),), spaces=CONVOLUTIONS),
)

REFUSED = (
    Refused(
        "`*Backbone` classes; HGNet v2, PP-LCNet, ViTPose, RT-DETR's ResNet, UVDoc",
        "they return feature maps only: use the `*Model` of the family, or the timm model where there is none",
        (
            *(Member("dinov2", VIT, "AutoBackbone"), Member("vitpose_backbone", PAIRS, "AutoBackbone")),
            *(Member("hgnet_v2", {}, "HGNetV2ForImageClassification"), Member("pp_lcnet", {}, "AutoBackbone")),
            *(Member("pp_lcnet_v3", {}, "AutoBackbone"), Member("pp_lcnet_v4", {}, "AutoBackbone")),
            Member("rt_detr_resnet", {**STAGES, "embedding_size": 8}, "AutoBackbone"),
            *(
                Member("lw_detr_vit", {**VIT, "image_size": 64}, "AutoBackbone"),
                Member("uvdoc_backbone", {}, "AutoBackbone"),
            ),
            Member("rf_detr_dinov2", VIT, "AutoBackbone"),
        ),
        "does not return a last_hidden_state",
        untried=("timm_backbone",),
    ),
    Refused(
        "DETR and its kin",
        "they make features of objects, not of images: use the vision model that they are built on",
        (
            *(Member("detr", DETR), Member("conditional_detr", DETR), Member("deformable_detr", DETR)),
            *(Member("dab-detr", DETR), Member("table-transformer", DETR)),
        ),
        "has a decoder",
    ),
    Refused(
        "VideoMAE, TimeSformer, ViViT",
        "they take videos",
        (
            *(Member("videomae", VIDEO), Member("timesformer", VIDEO)),
            Member("vivit", {**VIDEO, "tubelet_size": [2, 8, 8]}),
        ),
        "does not run on pixel values",
    ),
    Refused(
        "VideoPrism",
        "it takes videos",
        (Member("videoprism_vision_model", {**VIDEO, "num_spatial_layers": 1, "num_temporal_layers": 1}),),
        "takes pixel_values_videos, not images",
        untried=("videoprism",),
    ),
    Refused(
        "ImageGPT",
        "it takes the colours of a palette as words",
        (Member("imagegpt", {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 17, "n_positions": 16}),),
        "takes input_ids, not images",
    ),
    Refused(
        "Llama 4, Mllama (their vision models)",
        "they take tiles of an image, with a shape beside them",
        (
            Member(
                "mllama_vision_model",
                {**PLAIN, "attention_heads": 2, "num_global_layers": 1, "vision_output_dim": 64},
                "MllamaVisionModel",
            ),
        ),
        "does not run on pixel values",
        untried=("llama4", "mllama"),
    ),
    Refused(
        "Perceiver",
        "it has no model of images without a head",
        (
            Member(
                "perceiver",
                {"d_model": 16, "d_latents": 16, "num_latents": 4, "image_size": 32, "num_self_attends_per_block": 1},
                "PerceiverForImageClassificationLearned",
            ),
        ),
        "does not return a last_hidden_state",
    ),
    Refused("DepthPro", "it runs on many crops of an image", untried=("depth_pro",)),
    Refused("DiNAT", "it needs the library natten, with which it was not tried", untried=("dinat",)),
)

#: The family whose models transformers takes from another library; `test_families` tries it where timm is installed.
TIMM = Family("timm, by `TimmWrapperModel`", (), cut="", needs="the library timm")


def list_families() -> list[Family]:
    """The lines on models that work, timm's at the end."""
    return [*FAMILIES, TIMM]


def render_table() -> str:
    """The table of the README."""
    cuts = {"any": "yes", "last": "with `last_blocks=1`", "none": "no", "": "mostly"}
    lines = ["| family | works | frozen blocks run once | generated |", "|---|---|---|---|"]
    for family in list_families():
        works = f"needs {family.needs}" if family.needs else "yes"
        lines.append(f"| {family.name} | {works} | {cuts[family.cut]} | {', '.join(family.spaces)} |")
    for refused in REFUSED:
        lines.append(f"| {refused.name} | no: {refused.because} | | |")
    return "\n".join(lines)
