"""Small models of the libraries that people train with: as they come, with random weights.

They are built from configurations, with two or more layers, and with sides that differ so that
shapes can be told apart. Nothing is downloaded. What cannot be made small is on the meta device.

    model = build("llama")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision_stub  # noqa: F401  # before torchvision, which timm and transformers import
from torch import nn

# Wide enough that each kind of matrix is treated as at its usual size: a router is 16 times as long
# as wide, the other matrices are not and are more than 32 wide.
VOCAB, HIDDEN, INNER = 320, 96, 160
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 20,
}
BERT = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
T5 = {
    "vocab_size": VOCAB,
    "d_model": HIDDEN,
    "d_ff": INNER,
    "d_kv": 20,
    "num_heads": 4,
    "num_layers": 2,
}
IMAGES = {"image_size": 32, "patch_size": 8}
VIT = {
    **IMAGES,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_labels": 10,
}
STAGES = {"depths": [2, 2], "num_labels": 10}
EXPERTS = {**LLAMA, "num_experts_per_tok": 2}

# name -> classes of transformers without their ending, and the configuration.
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "ForCausalLM", LLAMA),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        {
            "vocab_size": VOCAB,
            "n_positions": 40,
            "n_embd": HIDDEN,
            "n_layer": 2,
            "n_head": 4,
            **ENDS,
        },
    ),
    "bert-masked-lm": ("Bert", "ForMaskedLM", BERT),
    "bert-classifier": ("Bert", "ForSequenceClassification", {**BERT, "num_labels": 3}),
    "bert-pretraining": ("Bert", "ForPreTraining", BERT),
    "bert-question-answering": ("Bert", "ForQuestionAnswering", BERT),
    "roberta-classifier": ("Roberta", "ForSequenceClassification", {**BERT, "num_labels": 3}),
    "roberta-masked-lm": ("Roberta", "ForMaskedLM", BERT),
    "electra-masked-lm": ("Electra", "ForMaskedLM", {**BERT, "embedding_size": 48}),
    "electra-pretraining": ("Electra", "ForPreTraining", {**BERT, "embedding_size": 48}),
    "distilbert-masked-lm": (
        "DistilBert",
        "ForMaskedLM",
        {"vocab_size": VOCAB, "dim": HIDDEN, "hidden_dim": INNER, "n_layers": 2, "n_heads": 4},
    ),
    "deberta-v2-classifier": (
        "DebertaV2",
        "ForSequenceClassification",
        {**BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "num_labels": 3},
    ),
    "t5": ("T5", "ForConditionalGeneration", T5),
    "t5-classifier": ("T5", "ForSequenceClassification", {**T5, "num_labels": 3}),
    "whisper": (
        "Whisper",
        "ForConditionalGeneration",
        {
            "vocab_size": VOCAB,
            "d_model": HIDDEN,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": INNER,
            "decoder_ffn_dim": INNER,
            "num_mel_bins": 40,
            "max_source_positions": 50,
            "max_target_positions": 44,
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
            **ENDS,
        },
    ),
    "wav2vec2-ctc": (
        "Wav2Vec2",
        "ForCTC",
        {
            **BERT,
            "vocab_size": 33,
            "conv_dim": [48, 48],
            "conv_kernel": [10, 3],
            "conv_stride": [5, 2],
            "num_conv_pos_embeddings": 16,
            "num_conv_pos_embedding_groups": 4,
        },
    ),
    "vit": ("ViT", "ForImageClassification", VIT),
    "beit": (
        "Beit",
        "ForImageClassification",
        {
            **VIT,
            "use_relative_position_bias": True,
            "use_absolute_position_embeddings": True,
            "use_mask_token": True,
        },
    ),
    "swin": (
        "Swin",
        "ForImageClassification",
        {**STAGES, "image_size": 32, "embed_dim": 48, "num_heads": [2, 4], "window_size": 4},
    ),
    "convnext": (
        "ConvNext",
        "ForImageClassification",
        {**STAGES, "num_stages": 2, "hidden_sizes": [48, 96]},
    ),
    "resnet": (
        "ResNet",
        "ForImageClassification",
        {**STAGES, "embedding_size": 40, "hidden_sizes": [144, 288]},
    ),
    "clip": (
        "CLIP",
        "Model",
        {
            "text_config": {**BERT, **ENDS},
            "vision_config": {key: VIT[key] for key in VIT if key != "num_labels"},
            "projection_dim": 72,
        },
    ),
    "siglip": (
        "Siglip",
        "Model",
        {
            "text_config": {**BERT, **ENDS, "projection_size": 72},
            "vision_config": {key: VIT[key] for key in VIT if key != "num_labels"},
        },
    ),
    "detr": (
        "Detr",
        "ForObjectDetection",
        {
            "d_model": HIDDEN,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": INNER,
            "decoder_ffn_dim": INNER,
            "num_queries": 20,
            "num_labels": 10,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "backbone_config": {
                "model_type": "resnet",
                "embedding_size": 40,
                "hidden_sizes": [144, 288],
                "depths": [1, 1],
                "out_features": ["stage2"],
            },
        },
    ),
    "mamba": (
        "Mamba",
        "ForCausalLM",
        {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "time_step_rank": 34},
    ),
    "mixtral": ("Mixtral", "ForCausalLM", {**EXPERTS, "num_local_experts": 6}),
    "qwen3-moe": (
        "Qwen3Moe",
        "ForCausalLM",
        {**EXPERTS, "num_experts": 6, "moe_intermediate_size": 64, "mlp_only_layers": [0]},
    ),
    "deepseek-v3": (
        "DeepseekV3",
        "ForCausalLM",
        {
            **EXPERTS,
            "moe_intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "first_k_dense_replace": 1,
            "n_routed_experts": 6,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 44,
            "kv_lora_rank": 36,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 20,
            "v_head_dim": 24,
        },
    ),
    "gpt-oss": ("GptOss", "ForCausalLM", {**EXPERTS, "num_local_experts": 6}),
}

VIT_TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": HIDDEN, "depth": 2, "num_heads": 4}
# name -> the name and arguments of timm.create_model; those without arguments are on meta.
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "timm-vit": ("vit_tiny_patch16_224", VIT_TIMM),
    "timm-vit-registers": ("vit_small_patch14_reg4_dinov2", {**VIT_TIMM, "num_classes": 10}),
    "timm-deit-distilled": ("deit_tiny_distilled_patch16_224", VIT_TIMM),
    "timm-dinov3": ("vit_small_patch16_dinov3", {**VIT_TIMM, "num_classes": 10}),
    "timm-swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 48, "depths": (2, 2), "num_heads": (2, 4)},
    ),
    "timm-convnext": ("convnext_tiny", {"depths": (2, 2, 1, 1), "dims": (48, 64, 80, 112)}),
    "timm-resnet": ("resnet26", {"layers": (2, 2, 1, 1), "channels": (16, 24, 32, 48)}),
    "timm-nfnet": ("nfnet_l0", {}),
    "timm-mobilenetv3": ("mobilenetv3_small_050", {}),
}

# name -> a function of torchvision.models. These have their usual widths, on the meta device.
TORCHVISION: dict[str, str] = {
    "torchvision-vgg": "vgg11_bn",
    "torchvision-mobilenet-v2": "mobilenet_v2",
    "torchvision-efficientnet": "efficientnet_b0",
    "torchvision-resnet": "resnet18",
    "torchvision-vit": "vit_b_16",
    "torchvision-squeezenet": "squeezenet1_1",
}


def _transformers(name: str) -> nn.Module:
    import transformers

    family, kind, options = TRANSFORMERS[name]
    config = getattr(transformers, f"{family}Config")(**options)
    model: nn.Module = getattr(transformers, f"{family}{kind}")(config)
    return model


def _timm(name: str) -> nn.Module:
    import timm

    model, options = TIMM[name]
    with torch.device("cpu" if options else "meta"):
        return timm.create_model(model, **{"num_classes": 10, **options})


def _torchvision(name: str) -> nn.Module:
    from torchvision import models

    with torch.device("meta"):
        model: nn.Module = getattr(models, TORCHVISION[name])(num_classes=10)
    return model


# ---- Adapters ------------------------------------------------------------------------------------

PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


def _adapted(base: str, config: str, **options: Any) -> nn.Module:
    import peft

    model: nn.Module = peft.get_peft_model(_transformers(base), getattr(peft, config)(**options))
    return model


def _lora() -> nn.Module:
    return _adapted("llama", "LoraConfig", r=4, target_modules=PROJECTIONS)


def _lora_of_embedding() -> nn.Module:
    return _adapted(
        "llama", "LoraConfig", r=4, target_modules=["q_proj", "embed_tokens", "lm_head"]
    )


def _dora() -> nn.Module:
    return _adapted("llama", "LoraConfig", r=4, target_modules=PROJECTIONS, use_dora=True)


def _boft() -> nn.Module:
    return _adapted("llama", "BOFTConfig", boft_block_size=4, target_modules=PROJECTIONS)


def _lora_classifier() -> nn.Module:
    """PEFT copies the classifier into ``modules_to_save``."""
    return _adapted(
        "roberta-classifier", "LoraConfig", task_type="SEQ_CLS", r=4, target_modules=["query"]
    )


def _prompt_tuning() -> nn.Module:
    return _adapted("llama", "PromptTuningConfig", task_type="CAUSAL_LM", num_virtual_tokens=8)


# ---- Wrappers ------------------------------------------------------------------------------------


def _compiled() -> nn.Module:
    model = torch.compile(_transformers("llama"))
    assert isinstance(model, nn.Module)
    return model


def _checkpointed() -> nn.Module:
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrapper

    model = _transformers("llama")
    kinds = ("LlamaDecoderLayer", "Linear", "Embedding")
    wrapper.apply_activation_checkpointing(
        model, check_fn=lambda module: type(module).__name__ in kinds
    )
    return model


def _weight_norm() -> nn.Module:
    """A convolutional net for audio with a classifier, all reparametrised."""
    norm = nn.utils.parametrizations.weight_norm
    blocks = [nn.Sequential(norm(nn.Conv1d(40, 40, 3)), nn.ReLU()) for _ in range(2)]
    body = nn.Sequential(norm(nn.Conv1d(12, 40, 5)), *blocks)
    return nn.ModuleDict({"body": body, "classifier": norm(nn.Linear(40, 10))})


ADAPTERS = ("peft", "transformers")
# name -> the libraries it needs, and its builder.
OTHERS: dict[str, tuple[tuple[str, ...], Callable[[], nn.Module]]] = {
    "peft-lora": (ADAPTERS, _lora),
    "peft-lora-embedding": (ADAPTERS, _lora_of_embedding),
    "peft-dora": (ADAPTERS, _dora),
    "peft-boft": (ADAPTERS, _boft),
    "peft-lora-classifier": (ADAPTERS, _lora_classifier),
    "peft-prompt-tuning": (ADAPTERS, _prompt_tuning),
    "wrapped-compile": (("transformers",), _compiled),
    "wrapped-checkpoint": (("transformers",), _checkpointed),
    "wrapped-weight-norm": (("torch",), _weight_norm),
}

NAMES = [*TRANSFORMERS, *TIMM, *TORCHVISION, *OTHERS]


def libraries(name: str) -> tuple[str, ...]:
    """The libraries that a model is made with."""
    if name in OTHERS:
        return OTHERS[name][0]
    if name in TRANSFORMERS:
        return ("transformers",)
    return ("timm",) if name in TIMM else ("torchvision",)


def build(name: str) -> nn.Module:
    """A new model.

    Args:
        name: one of ``NAMES``.
    """
    if name in OTHERS:
        return OTHERS[name][1]()
    builders = {"transformers": _transformers, "timm": _timm, "torchvision": _torchvision}
    return builders[libraries(name)[0]](name)
