"""timm: "dykaf" by name, its groups, layer-wise rates, schedules, Lookahead."""

from __future__ import annotations

import warnings
from argparse import Namespace
from functools import partial
from itertools import islice

import pytest
import timm.optim
import torch
from runs import assert_equal, changed, groups_of, weights
from timm.models import VisionTransformer
from timm.scheduler import CosineLRScheduler
from tiny import images
from torch import nn

import dykaf
from dykaf.integrations.timm import create_optimizer_v2

LR, WEIGHT_DECAY = 0.01, 0.2


def vit(num_classes: int = 4) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=16,
        patch_size=4,
        in_chans=1,
        num_classes=num_classes,
        embed_dim=32,
        depth=2,
        num_heads=4,
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int = 6) -> None:
    pictures, label = images(256)
    batches = zip(pictures.split(16), label.split(16), strict=True)
    for batch, target in islice(batches, num_steps):
        nn.functional.cross_entropy(model(batch), target).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_name_makes_dykaf_over_its_groups() -> None:
    model = vit()
    optimizer = create_optimizer_v2(
        model, opt="dykaf", lr=LR, weight_decay=WEIGHT_DECAY, betas=(0.8, 0.9), sides="both"
    )
    assert type(optimizer) is dykaf.DyKAF
    # What the model itself takes off weight decay, by timm's own convention.
    assert model.no_weight_decay() >= {"pos_embed", "cls_token"}
    by_hand = dykaf.DyKAF(
        dykaf.param_groups(vit(), no_decay=["pos_embed", "cls_token"]),
        lr=LR,
        weight_decay=WEIGHT_DECAY,
        betas=(0.8, 0.9),
        sides="both",
    )
    keys = ("lr", "weight_decay", "max_precond_dim", "betas", "sides")
    found = groups_of(optimizer, *keys)
    assert found == groups_of(by_hand, *keys)
    assert [group["lr"] for group in found] == [LR, 2 * LR, 2 * LR]
    assert [group["weight_decay"] for group in found] == [WEIGHT_DECAY, WEIGHT_DECAY, 0.0]
    assert found[1]["names"] == ["head.weight"]
    assert {"pos_embed", "cls_token", "norm.weight"} <= set(found[2]["names"])
    assert sum(len(group["names"]) for group in found) == len(weights(model))


def test_run_equals_one_by_hand() -> None:
    finals = []
    for decay in (WEIGHT_DECAY, 0.0):
        model, other = vit(), vit()
        train(model, create_optimizer_v2(model, "dykaf", LR, decay))
        groups = dykaf.param_groups(other, no_decay=["pos_embed", "cls_token"])
        train(other, dykaf.DyKAF(groups, lr=LR, weight_decay=decay))
        assert_equal(weights(model), weights(other))
        finals.append(weights(model))
    assert "blocks.0.attn.qkv.weight" in changed(*finals)


def test_the_registry_alone() -> None:
    """timm's own function knows the name; its groups do not tell the head, which is said."""
    model = vit()
    with pytest.warns(UserWarning, match="param_group_fn=dykaf.param_groups"):
        optimizer = timm.optim.create_optimizer_v2(model, opt="dykaf", lr=LR, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = timm.optim.create_optimizer_v2(
            model, opt="dykaf", lr=LR, param_group_fn=dykaf.param_groups
        )
    expected = dykaf.DyKAF(dykaf.param_groups(model), lr=LR, weight_decay=0.0)
    assert groups_of(optimizer, "lr", "weight_decay") == groups_of(expected, "lr", "weight_decay")
    assert "dykaf" in timm.optim.list_optimizers()


def test_the_arguments_of_a_command_line() -> None:
    """As timm's training script hands them on."""
    cfg = Namespace(
        opt="dykaf", lr=LR, weight_decay=WEIGHT_DECAY, momentum=0.9, opt_betas=[0.8, 0.9]
    )
    model = vit()
    optimizer = create_optimizer_v2(model, **timm.optim.optimizer_kwargs(cfg=cfg))
    keys = ("lr", "weight_decay", "betas")
    expected = create_optimizer_v2(model, "dykaf", LR, WEIGHT_DECAY, betas=(0.8, 0.9))
    assert groups_of(optimizer, *keys) == groups_of(expected, *keys)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


def test_other_arguments_pass() -> None:
    model = vit()
    adamw = create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=0.1)
    assert type(adamw) is torch.optim.AdamW
    theirs = timm.optim.create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=0.1)
    assert [len(group["params"]) for group in adamw.param_groups] == [
        len(group["params"]) for group in theirs.param_groups
    ]
    own = partial(dykaf.param_groups, adam=["blocks.*"])
    optimizer = create_optimizer_v2(model, opt="dykaf", lr=LR, param_group_fn=own)
    assert groups_of(optimizer) == groups_of(dykaf.DyKAF(own(model)))
    with pytest.warns(UserWarning, match="timm's own groups"):
        plain = create_optimizer_v2(list(model.parameters()), opt="dykaf", lr=LR)
    assert plain.param_groups[0]["params"] == list(model.parameters())
    assert create_optimizer_v2(model).defaults["lr"] == 0.01  # DyKAF's own


def test_layer_decay_is_timms_own() -> None:
    model = vit()
    optimizer = create_optimizer_v2(
        model, opt="dykaf", lr=LR, weight_decay=WEIGHT_DECAY, layer_decay=0.5
    )
    theirs = timm.optim.param_groups_layer_decay(vit(), layer_decay=0.5)
    ours = {
        name: group["lr_scale"] for group in optimizer.param_groups for name in group["param_names"]
    }
    named = dict(model.named_parameters())
    layers = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
    expected = {id(param): layer["lr_scale"] for layer in layers for param in layer["params"]}
    assert len(theirs) == len(layers)
    assert ours == {name: expected[id(param)] for name, param in named.items()}
    assert ours["head.weight"] == 1.0
    assert ours["blocks.1.attn.qkv.weight"] == 2 * ours["blocks.0.attn.qkv.weight"]

    plain = groups_of(create_optimizer_v2(vit(), lr=LR, weight_decay=WEIGHT_DECAY), "weight_decay")
    decay_of = {name: group["weight_decay"] for group in plain for name in group["names"]}
    for group in optimizer.param_groups:
        assert {decay_of[name] for name in group["param_names"]} == {group["weight_decay"]}

    # The schedule multiplies both: the layer's scale and what DyKAF makes of the rate for AdamW.
    schedule = CosineLRScheduler(optimizer, t_initial=10, warmup_t=2, warmup_lr_init=0.0)
    schedule.step(1)
    for group in optimizer.param_groups:
        ratio = 2.0 if group["max_precond_dim"] == 0 else 1.0
        assert group["lr"] == pytest.approx(0.5 * LR * ratio * group["lr_scale"], rel=1e-12)


def test_least_scale() -> None:
    optimizer = create_optimizer_v2(
        vit(), opt="dykaf", lr=LR, layer_decay=0.5, layer_decay_min_scale=0.4
    )
    assert {group["lr_scale"] for group in optimizer.param_groups} == {0.4, 0.5, 1.0}


def test_layers_under_a_scale_are_frozen() -> None:
    model = vit()
    optimizer = create_optimizer_v2(
        model, opt="dykaf", lr=LR, layer_decay=0.5, layer_decay_no_opt_scale=0.3
    )
    before = weights(model)
    train(model, optimizer)
    after = changed(before, weights(model))
    assert "blocks.1.attn.qkv.weight" in after
    assert not [name for name in after if name.startswith(("patch_embed", "blocks.0"))]


def test_lookahead() -> None:
    """From its sixth step on, each sixth goes half of the way from there."""
    model, fast, early = vit(), vit(), vit()
    optimizer = create_optimizer_v2(model, opt="lookahead_dykaf", lr=LR)
    train(model, optimizer, 12)
    train(early, create_optimizer_v2(early, opt="dykaf", lr=LR), 6)
    train(fast, create_optimizer_v2(fast, opt="dykaf", lr=LR), 12)
    start = weights(early)
    half = {name: start[name].add(x - start[name], alpha=0.5) for name, x in weights(fast).items()}
    assert_equal(weights(model), half)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_heads_of_real_models_go_to_adamw(name: str) -> None:
    model = timm.create_model(name, num_classes=7)
    optimizer = create_optimizer_v2(model, opt="dykaf", lr=LR, weight_decay=WEIGHT_DECAY)
    classifier = model.get_classifier().weight
    group = next(
        group
        for group in optimizer.param_groups
        if any(param is classifier for param in group["params"])
    )
    assert (group["max_precond_dim"], group["weight_decay"]) == (0, WEIGHT_DECAY)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(weights(model))
