"""What the weights of a model are: by what the model says, the kind of module, and the name."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from dykaf.state import num_batch_dims, shape_of

# Names of layers that map to classes, a vocabulary or boxes, or of containers whose last layer
# does; and the last words of such names.
HEAD_NAMES = frozenset(
    {
        "bbox_embed",
        "bbox_predictor",
        "class_embed",
        "classifier_distill",
        "fc",
        "heads",
        "lm_heads",
    }
)
HEAD_WORDS = frozenset({"classifier", "head", "logits"})
# Names of such layers alone: containers of these names are parts of blocks, too.
HEAD_LAYER_NAMES = HEAD_NAMES | {
    "bbox_pred",
    "cls_score",
    "dense_prediction",
    "embed_out",
    "head_dist",
    "logits_proj",
    "output",
    "output_layer",
    "output_projection",
    "proj_out",
    "qa_outputs",
    "score",
    "seq_relationship",
    "to_logits",
    "unembed",
    "vocab_projector",
}
# By their last two names.
HEAD_TAILS = frozenset({"predictions.decoder"})
# Not heads, whatever their words are: timm's last convolution before the pooling, and what comes
# before the last layer.
_NO_HEADS = frozenset({"conv_head", "pre_logits"})

# Methods by which models name their heads (transformers, timm).
_HEAD_METHODS = ("get_output_embeddings", "get_classifier")

# Words in the names of tables that are added by position, and of inputs that are learned.
_POSITION_WORDS = frozenset(
    {"pos", "position", "positions", "positional", "rel", "relative", "wpe"}
)
_TOKEN_WORDS = frozenset({"token", "tokens"})
_TOKEN_NAMES = frozenset({"class_embedding", "latents"})

_DECAY_NAMES = frozenset({"A_log"})  # of state-space models
# Of PEFT's adapters: what rotations are made of, and tables of an embedding, whose columns belong
# to tokens.
_ADAPTER_NAMES = frozenset({"boft_R", "lora_embedding_A", "lora_embedding_B", "oft_R", "oft_r"})

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_CONVS = (nn.modules.conv._ConvNd,)
# Their weights are matrices however few inputs or outputs there are.
_MAPS = (nn.Linear, *_CONVS, *_EMBEDDINGS)
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.LocalResponseNorm,
    nn.modules.batchnorm._NormBase,
)

# Names of numbered blocks.
_BLOCK = re.compile(r"(^|_)\d+$|^(block|layer|stage)\d+$")
_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\.([^.]+)\.original\d*$")
_WRAPPERS = re.compile(
    r"(^|\.)(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|base_layer"
    r"|original_module|modules_to_save\.[^.]+)(?=\.|$)"
)


class Role(Enum):
    """Where a weight goes if no pattern says otherwise."""

    MATRIX = "DyKAF"
    ADAM = "AdamW"
    NO_DECAY = "AdamW without weight decay"


@dataclass
class Weight:
    """A parameter of a model."""

    name: str  # the first
    param: Tensor
    # Without what wrappers put into them; a tied parameter has several.
    names: list[str] = field(default_factory=list)
    role: Role = Role.MATRIX
    batch_dims: int | None = None  # other than what the shape says

    def is_any_of(self, patterns: Iterable[str]) -> bool:
        """Whether one of the names matches one of the patterns."""
        plain = [plain_name(pattern) for pattern in patterns]
        return any(fnmatchcase(name, pattern) for name in self.names for pattern in plain)


def plain_name(name: str) -> str:
    """A parameter's or module's name without what wrappers put into it.

    These are torch.compile's, activation checkpointing's, FSDP's, parametrizations' and PEFT's.
    """
    name = _PARAMETRIZED.sub(r"\1\2", name)
    return _WRAPPERS.sub("", name).lstrip(".")


def weights_of(model: nn.Module) -> list[Weight]:
    """All parameters of a model in its order, each with its role."""
    heads, undecayed = set(_heads(model)), set(_undecayed(model))
    found: dict[Tensor, Weight] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for module_name, module in modules.items():
        for local_name, param in module.named_parameters(recurse=False):
            full = f"{module_name}.{local_name}" if module_name else local_name
            weight = found.setdefault(param, Weight(full, param))
            weight.names.append(plain_name(full))
            owner = module
            if _PARAMETRIZED.search(full):
                owner = modules[module_name.rpartition("parametrizations")[0].rstrip(".")]
            # A tied parameter has every role of its names; the last of Role's counts.
            if (
                param in undecayed
                or isinstance(owner, _NORMS)
                or _is_vector(module, local_name, param)
                or _is_undecayed(owner, weight.names[-1])
            ):
                weight.role = Role.NO_DECAY
            elif weight.role is Role.MATRIX and (
                param in heads
                or _is_table(owner, weight.names[-1])
                or _is_depthwise(owner)
                or _has_one_row_or_column(param)
            ):
                weight.role = Role.ADAM
            batch_dims = _batch_dims(owner, weight.names[-1], param)
            is_unknown = is_lazy(param) and isinstance(owner, _CONVS)
            if is_unknown or batch_dims != num_batch_dims(shape_of(param), None):
                weight.batch_dims = batch_dims
    return list(found.values())


def _heads(model: nn.Module) -> Iterator[Tensor]:
    # What comes before a model, such as a normalization, and the model are no blocks.
    is_pipeline = isinstance(model, nn.Sequential) and len({*map(type, model)}) == len(model)
    for name, module in model.named_modules(remove_duplicate=False):
        for method in _HEAD_METHODS:
            yield from _weights_said(module, method)
        parts = plain_name(name).split(".")
        is_in_block = any(_BLOCK.search(part) for part in parts[is_pipeline:-1])
        if is_in_block or parts[-1].isdigit() or not _NO_HEADS.isdisjoint(parts):
            continue  # of a block, or before a head
        is_named = parts[-1] in HEAD_NAMES or parts[-1].split("_")[-1] in HEAD_WORDS
        if _is_map(module):
            if is_named or parts[-1] in HEAD_LAYER_NAMES or ".".join(parts[-2:]) in HEAD_TAILS:
                yield from _own_weights(module)
        elif is_named and not any(
            isinstance(child, nn.MultiheadAttention) for child in module.modules()
        ):  # else it pools
            for part in module if isinstance(module, nn.ModuleList) else [module]:
                yield from (w for w in _last_weights(part) if not _is_square(w))


def _weights_said(module: nn.Module, method: str) -> Iterator[Tensor]:
    said = _said(module, method)
    for head in said if isinstance(said, (tuple, list)) else [said]:
        if isinstance(head, nn.Module):
            yield from _last_weights(head)


def _said(module: nn.Module, name: str) -> Any:
    """What a method without arguments, or an attribute, says; None where it is of another kind."""
    try:
        said = getattr(module, name, None)
        if callable(said) and not isinstance(said, nn.Module):
            inspect.signature(said).bind()
            return said()
    except Exception:  # whatever the model raises: base classes say so that there is none
        return None
    return said


def _is_map(module: nn.Module) -> bool:
    """Whether it is a map of features: a matrix, or a convolution with kernels of one point."""
    if isinstance(module, _CONVS):
        return set(module.kernel_size) == {1}
    weights = [] if isinstance(module, _EMBEDDINGS) else _own_weights(module)
    return isinstance(module, nn.Linear) or any(
        not is_lazy(weight) and weight.ndim == 2 for weight in weights
    )


def _own_weights(module: nn.Module) -> list[Tensor]:
    if parametrize.is_parametrized(module, "weight"):
        originals = module.get_submodule("parametrizations.weight")
        return list(originals.parameters(recurse=False))
    own = dict(module.named_parameters(recurse=False))
    # Older hooks rename it: weight_norm, spectral_norm, pruning.
    names = ("weight", "weight_orig", "weight_v")
    return next(([own[name]] for name in names if name in own), [])


def _is_square(weight: Tensor) -> bool:
    """Whether it maps features to as many: what comes before a head does."""
    return not is_lazy(weight) and weight.ndim >= 2 and weight.shape[0] == weight.shape[1]


def _last_weights(module: nn.Module) -> list[Tensor]:
    """Of the last map in a container; of a dictionary of maps, of each."""
    if _is_map(module):
        return _own_weights(module)
    of_children = [_last_weights(child) for child in module.children()]
    if isinstance(module, nn.ModuleDict) and all(map(_is_map, module.values())):
        return [weight for weights in of_children for weight in weights]
    return next((weights for weights in reversed(of_children) if weights), [])


def _undecayed(model: nn.Module) -> Iterator[Tensor]:
    """What modules and parameters say themselves (timm, state-space models)."""
    for module in model.modules():
        if getattr(module, "_no_weight_decay", False):
            yield from module.parameters(recurse=False)
        names = _said(module, "no_weight_decay")
        if isinstance(names, (str, set, frozenset, list, tuple, dict)):
            names = [names] if isinstance(names, str) else names
            said = [plain_name(name) for name in names if isinstance(name, str)]
            for full, param in module.named_parameters():
                name = plain_name(full)
                if any(name == entry or name.startswith(f"{entry}.") for entry in said):
                    yield param
    for param in model.parameters():
        if getattr(param, "_no_weight_decay", False):
            yield param


def _is_undecayed(module: nn.Module, name: str) -> bool:
    parts = name.split(".")
    if isinstance(module, _EMBEDDINGS):
        return _is_position(parts[-3:-1]) or parts[-2:-1] in (["mask_tokens"], ["iou_token"])
    words = parts[-1].split("_")
    if words[-1] in ("bias", "biases"):  # of experts, a stack of vectors; by position
        return True
    if isinstance(module, _MAPS):
        return False
    return (
        _is_position(parts[-1:] if _is_larger(module) else parts[-2:])
        or words[-1] in _TOKEN_WORDS
        or parts[-1] in _TOKEN_NAMES | _DECAY_NAMES
        or (parts[-1] == "D" and hasattr(module, "A_log"))
    )


def _is_larger(module: nn.Module) -> bool:
    """Whether it is more than one table: attention, say, whose weights are maps."""
    return isinstance(module, nn.Bilinear) or len(list(module.parameters())) > 1


def _is_position(parts: Iterable[str]) -> bool:
    return any(not _POSITION_WORDS.isdisjoint(part.split("_")) for part in parts)


def _is_vector(module: nn.Module, local_name: str, param: Tensor) -> bool:
    """Whether all entries lie along one dimension, and not for lack of inputs or outputs."""
    is_map = isinstance(module, _MAPS) and local_name in ("weight", "weight_orig", "weight_v")
    if is_lazy(param) or (is_map and param.ndim >= 2):
        return not is_map
    return param.numel() == max(param.shape, default=1)


def _has_one_row_or_column(param: Tensor) -> bool:
    """Whether it maps to or from a single feature, so that there is no basis to turn."""
    shape = shape_of(param)
    return len(shape) >= 2 and math.prod(shape) == max(shape)


def _is_table(module: nn.Module, name: str) -> bool:
    own_names = name.split(".")[-2:]  # an adapter's has the adapter's name behind
    return isinstance(module, _EMBEDDINGS) or not _ADAPTER_NAMES.isdisjoint(own_names)


def _is_depthwise(module: nn.Module) -> bool:
    """Whether no input is mixed with another, so that the kernel is no matrix but a list."""
    return isinstance(module, _CONVS) and 1 < module.groups == module.in_channels


def _batch_dims(module: nn.Module, name: str, param: Tensor) -> int:
    if isinstance(module, _CONVS):
        return 0
    shape = shape_of(param)
    if len(shape) == 3 and "experts" in name.split("."):
        return 1
    return num_batch_dims(shape, None)
