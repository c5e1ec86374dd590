"""What the weights of a model are known by. Real models: tests/integrations/golden."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dykaf import DyKAF, param_groups
from dykaf.routing import Role, plain_name, weights_of


def roles(model: nn.Module) -> dict[str, Role]:
    return {weight.name: weight.role for weight in weights_of(model)}


def bare(**named: tuple[int, ...]) -> nn.Module:
    """A module of another kind with parameters of its own."""
    module = nn.Module()
    for name, size in named.items():
        module.register_parameter(name, nn.Parameter(torch.ones(size)))
    return module


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("lm_head.weight", "lm_head.weight"),
        ("_orig_mod.lm_head.weight", "lm_head.weight"),
        ("blocks.0._checkpoint_wrapped_module.mlp.weight", "blocks.0.mlp.weight"),
        ("_fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.w", "blocks.0.w"),
        ("head.base_layer.weight", "head.weight"),
        ("base_model.model.score.modules_to_save.default.weight", "base_model.model.score.weight"),
        ("base_model.model.score.original_module.weight", "base_model.model.score.weight"),
        ("conv.parametrizations.weight.original0", "conv.weight"),
        ("parametrizations.weight.original", "weight"),
        ("base_layers.0._orig_modus.weight", "base_layers.0._orig_modus.weight"),
        ("modules_to_save", "modules_to_save"),
    ],
)
def test_names_without_wrappers(name: str, plain: str) -> None:
    assert plain_name(name) == plain


# ---- Heads ---------------------------------------------------------------------------------------


class SaysItsHead(nn.Module):
    """As models of transformers do."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4, bias=False)
        self.words = head

    def get_output_embeddings(self) -> Any:
        return self.words


def test_a_head_that_the_model_names() -> None:
    model = nn.ModuleDict({"wrapped": SaysItsHead(nn.Linear(4, 9, bias=False))})
    assert roles(model) == {
        "wrapped.body.weight": Role.MATRIX,
        "wrapped.words.weight": Role.ADAM,
    }
    assert roles(SaysItsHead(None)) == {"body.weight": Role.MATRIX}


def test_heads_that_the_model_names_in_a_tuple() -> None:
    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 3, bias=False) for _ in range(3))

        def get_classifier(self) -> tuple[nn.Module, nn.Module]:
            return self.a, self.b

    assert list(roles(Distilled()).values()) == [Role.ADAM, Role.ADAM, Role.MATRIX]


def test_a_model_that_cannot_name_its_head() -> None:
    class Says(SaysItsHead):
        def get_output_embeddings(self) -> Any:
            raise NotImplementedError

    assert set(roles(Says(nn.Linear(4, 9, bias=False))).values()) == {Role.MATRIX}


def test_methods_of_a_models_own_meaning() -> None:
    class Own(nn.Module):
        no_weight_decay = ("body",)

        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 5, bias=False)
            self.last = nn.Linear(5, 3, bias=False)

        def get_classifier(self, name: str) -> nn.Module:
            raise AssertionError("is not to be called")

        @property
        def get_output_embeddings(self) -> Any:
            raise RuntimeError("not built yet")

    assert roles(Own()) == {"body.weight": Role.NO_DECAY, "last.weight": Role.MATRIX}


def test_the_last_layer_of_a_head() -> None:
    model = nn.ModuleDict(
        {
            "classifier": nn.Sequential(
                nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False), nn.Dropout()
            ),
            "heads": nn.ModuleList([nn.Linear(4, 2, bias=False), nn.Linear(4, 3, bias=False)]),
            "decode": nn.ModuleDict({"head": nn.Conv2d(4, 3, 1, bias=False)}),
            "predictions": nn.ModuleDict({"decoder": nn.Linear(4, 9, bias=False)}),
        }
    )
    assert roles(model) == {
        "classifier.0.weight": Role.MATRIX,
        "classifier.2.weight": Role.ADAM,
        "heads.0.weight": Role.ADAM,
        "heads.1.weight": Role.ADAM,
        "decode.head.weight": Role.ADAM,
        "predictions.decoder.weight": Role.ADAM,
    }


def test_boxes_and_classes_of_each_layer() -> None:
    """As detectors have them: a small network for each layer of the decoder."""

    def mlp() -> nn.Module:
        layers = [nn.Linear(4, 4, bias=False), nn.Linear(4, 3, bias=False)]
        return nn.ModuleDict({"layers": nn.ModuleList(layers)})

    model = nn.ModuleDict(
        {
            "bbox_embed": nn.ModuleList([mlp(), mlp()]),
            "span_logits": mlp(),
            "task_head": nn.ModuleDict(
                {"a": nn.Linear(4, 2, bias=False), "b": nn.Linear(4, 3, bias=False)}
            ),
            "mlm_head": nn.ModuleDict({"transform": mlp(), "decoder": nn.Linear(4, 9, bias=False)}),
        }
    )
    assert [name for name, role in roles(model).items() if role is Role.ADAM] == [
        "bbox_embed.0.layers.1.weight",
        "bbox_embed.1.layers.1.weight",
        "span_logits.layers.1.weight",
        "task_head.a.weight",
        "task_head.b.weight",
        "mlm_head.decoder.weight",
    ]


def test_what_comes_before_a_head() -> None:
    pool = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "fc2": nn.Linear(6, 4)})
    model = nn.ModuleDict(
        {
            "head": nn.ModuleDict({"dense": nn.Linear(4, 4, bias=False), "act": nn.GELU()}),
            "pre_logits": nn.ModuleDict({"fc": nn.Linear(4, 6, bias=False)}),
            "pool": nn.ModuleDict({"head": pool}),
        }
    )
    matrices = {name for name, role in roles(model).items() if role is Role.MATRIX}
    assert {"head.dense.weight", "pre_logits.fc.weight", "pool.head.fc2.weight"} <= matrices


def test_no_head_is_within_a_numbered_block() -> None:
    block = {"fc": nn.Linear(4, 4, bias=False), "output": nn.Linear(4, 4, bias=False)}
    model = nn.ModuleDict(
        {
            "blocks": nn.ModuleList([nn.ModuleDict(block)]),
            "layer_0": nn.ModuleDict({"fc": nn.Linear(4, 4, bias=False)}),
            "block1": nn.ModuleDict({"head": nn.Linear(4, 4, bias=False)}),
        }
    )
    assert set(roles(model).values()) == {Role.MATRIX}


def test_a_model_behind_a_normalization_keeps_its_head() -> None:
    net = nn.ModuleDict({"body": nn.Linear(4, 5), "fc": nn.Linear(5, 3)})
    assert roles(nn.Sequential(nn.Flatten(), net))["1.fc.weight"] is Role.ADAM
    assert roles(nn.Sequential(net, net))["0.fc.weight"] is Role.MATRIX


def test_a_container_of_a_layer_name_is_no_head() -> None:
    """BERT's blocks have an `output` of several layers."""
    model = nn.ModuleDict({"output": nn.ModuleDict({"dense": nn.Linear(4, 4, bias=False)})})
    assert roles(model) == {"output.dense.weight": Role.MATRIX}


def test_heads_within_wrappers() -> None:
    body: dict[str, nn.Module] = {
        "mlp": checkpoint_wrapper(nn.Linear(4, 4, bias=False)),
        "lm_head": checkpoint_wrapper(nn.Linear(4, 9, bias=False)),
    }
    normed = nn.ModuleDict(
        {"lm_head": nn.utils.parametrizations.weight_norm(nn.Linear(4, 9, bias=False))}
    )
    model = nn.ModuleDict(body)
    expected = {
        "mlp._checkpoint_wrapped_module.weight": Role.MATRIX,
        "lm_head._checkpoint_wrapped_module.weight": Role.ADAM,
    }
    assert roles(model) == expected
    compiled = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    assert roles(compiled) == {f"_orig_mod.{name}": role for name, role in expected.items()}
    old = nn.ModuleDict({"lm_head": nn.utils.weight_norm(nn.Linear(4, 9, bias=False))})
    assert roles(old) == {
        "lm_head.weight_g": Role.NO_DECAY,
        "lm_head.weight_v": Role.ADAM,
    }
    assert roles(normed) == {
        "lm_head.parametrizations.weight.original0": Role.NO_DECAY,
        "lm_head.parametrizations.weight.original1": Role.ADAM,
    }


def test_patterns_do_not_see_wrappers() -> None:
    model = nn.ModuleDict({"mlp": checkpoint_wrapper(nn.Linear(4, 4, bias=False))})
    for pattern in ("mlp.weight", "mlp._checkpoint_wrapped_module.weight"):
        (group,) = param_groups(model, adam=[pattern])
        assert group["max_precond_dim"] == 0
        assert group["params"][0][0] == "mlp._checkpoint_wrapped_module.weight"


def test_depthwise_convolutions_are_no_matrices() -> None:
    model = nn.ModuleDict(
        {
            "depthwise": nn.Conv1d(4, 8, 3, groups=4, bias=False),
            "grouped": nn.Conv1d(4, 8, 3, groups=2, bias=False),
            "one": nn.Conv1d(1, 8, 3, bias=False),
        }
    )
    assert list(roles(model).values()) == [Role.ADAM, Role.MATRIX, Role.MATRIX]


def test_maps_of_a_single_feature_have_no_basis() -> None:
    model = nn.ModuleDict(
        {
            "gate": nn.Linear(4, 1, bias=False),
            "first": nn.Conv1d(1, 6, 1, bias=False),
            "wide": nn.Conv1d(1, 6, 2, bias=False),
        }
    )
    assert list(roles(model).values()) == [Role.ADAM, Role.ADAM, Role.MATRIX]


def test_gains_of_convolutions_are_vectors() -> None:
    conv = nn.Conv2d(3, 4, 2, bias=False)
    conv.register_parameter("gain", nn.Parameter(torch.ones(4, 1, 1, 1)))
    assert roles(conv) == {"weight": Role.MATRIX, "gain": Role.NO_DECAY}


# ---- Without decay -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("pos_embed", (1, 5, 4)),
        ("positional_embedding", (5, 4)),
        ("relative_position_bias_table", (9, 2)),
        ("rel_pos_h", (7, 4)),
        ("cls_token", (1, 1, 4)),
        ("register_tokens", (1, 3, 4)),
        ("mask_token", (2, 4)),
        ("class_embedding", (2, 4)),
        ("A_log", (8, 4)),
        ("down_proj_bias", (3, 4)),
        ("attention_biases", (3, 4)),
        ("latents", (3, 4)),
    ],
)
def test_parameters_without_decay(name: str, shape: tuple[int, ...]) -> None:
    assert roles(bare(**{name: shape, "weight": (5, 4)})) == {
        name: Role.NO_DECAY,
        "weight": Role.MATRIX,
    }


@pytest.mark.parametrize(
    "name",
    [
        "wpe",
        "position_embeddings",
        "embed_positions",
        "relative_attention_bias",
        "rel_attn_embed",
        "mask_tokens",
    ],
)
def test_tables_of_positions(name: str) -> None:
    model = nn.ModuleDict({name: nn.Embedding(5, 4), "embed_tokens": nn.Embedding(9, 4)})
    assert roles(model) == {f"{name}.weight": Role.NO_DECAY, "embed_tokens.weight": Role.ADAM}


def test_tables_within_what_is_named_for_positions() -> None:
    tables = {"row_embeddings": nn.Embedding(5, 4), "relative_position": bare(table=(7, 4))}
    model = nn.ModuleDict({"position_embedding": nn.ModuleDict(tables)})
    assert set(roles(model).values()) == {Role.NO_DECAY}


def test_attention_named_for_positions_is_no_table() -> None:
    model = nn.ModuleDict({"pos_attn": nn.MultiheadAttention(4, 2, bias=False)})
    assert set(roles(model).values()) == {Role.MATRIX}


def test_names_that_mean_something_else() -> None:
    """A dictionary D, and a map between tokens."""
    assert set(roles(bare(D=(8, 4), token_mixing=(8, 4))).values()) == {Role.MATRIX}
    assert roles(bare(D=(8, 4), A_log=(8, 4)))["D"] is Role.NO_DECAY


@pytest.mark.parametrize("name", ["pos_proj", "linear_pos", "tokens_to_heads", "pos_conv_embed"])
def test_maps_are_no_tables(name: str) -> None:
    model = nn.ModuleDict({name: nn.Linear(4, 5, bias=False)})
    assert roles(model) == {f"{name}.weight": Role.MATRIX}


def test_what_modules_and_parameters_say() -> None:
    class Says(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.ones(3, 4))
            self.mlp = nn.Sequential(nn.Linear(4, 5, bias=False))
            self.free = nn.Linear(4, 5, bias=False)
            self.marked = nn.Linear(4, 5, bias=False)
            self.whole = nn.Linear(4, 5, bias=False)
            self.marked.weight._no_weight_decay = True  # type: ignore[assignment]
            self.whole._no_weight_decay = True  # type: ignore[assignment]

        def no_weight_decay(self) -> set[str]:
            return {"table", "mlp.0", "nothing", "fre"}

    assert roles(nn.ModuleDict({"model": Says()})) == {
        "model.table": Role.NO_DECAY,
        "model.mlp.0.weight": Role.NO_DECAY,
        "model.free.weight": Role.MATRIX,
        "model.marked.weight": Role.NO_DECAY,
        "model.whole.weight": Role.NO_DECAY,
    }


def test_lazy_modules() -> None:
    model = nn.ModuleDict({"mlp": nn.LazyLinear(4), "head": nn.LazyLinear(3)})
    assert roles(model) == {
        "mlp.weight": Role.MATRIX,
        "mlp.bias": Role.NO_DECAY,
        "head.weight": Role.ADAM,
        "head.bias": Role.NO_DECAY,
    }


# ---- Stacks --------------------------------------------------------------------------------------


def seen_as(groups: Any, lr: float = 0.1) -> dict[tuple[int, ...], tuple[int, ...]]:
    """The batch of matrices as which each parameter has state, by its shape."""
    optimizer = DyKAF(groups, lr=lr)
    params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    for param in params:
        param.grad = torch.randn(param.shape)
    optimizer.step()
    return {tuple(p.shape): tuple(optimizer.state[p]["step"].shape) for p in params}


def test_stacks_by_shape() -> None:
    shapes = [(2, 3, 4), (3, 3, 3), (4, 3, 9), (3, 4, 2), (2, 3, 4, 5), (2, 6, 4, 5), (1, 5, 4)]
    found = seen_as([nn.Parameter(torch.ones(shape)) for shape in shapes])
    assert found == {
        (2, 3, 4): (2,),
        (3, 3, 3): (3,),
        (4, 3, 9): (),
        (3, 4, 2): (),
        (2, 3, 4, 5): (2, 3),
        (2, 6, 4, 5): (),
        (1, 5, 4): (1,),
    }


def test_batch_dims_apply_to_what_has_them() -> None:
    """A matrix beside a stack keeps its factors."""
    shapes = [(4, 3, 9), (5, 4), (6,), (2, 6, 4, 5)]
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizer = DyKAF([{"params": params, "batch_dims": 1}])
    for param in params:
        param.grad = torch.randn(param.shape)
    optimizer.step()
    batches = [tuple(optimizer.state[param]["step"].shape) for param in params]
    assert batches == [(4,), (), (), (2,)]
    found = seen_as([{"params": [params[0], params[3]], "batch_dims": 10}])
    assert found == {(4, 3, 9): (4,), (2, 6, 4, 5): (2, 6)}
    assert ["rho" in optimizer.state[param] for param in params] == [True, True, False, True]


def test_convolutions_are_no_stacks() -> None:
    model = nn.ModuleDict(
        {
            "long": nn.Conv1d(3, 3, 5, bias=False),  # by its shape a stack
            "conv": nn.Conv2d(3, 4, 2, bias=False),
            "normed": nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 6, bias=False)),
            "mlp": nn.Linear(7, 6, bias=False),
        }
    )
    groups = param_groups(model)
    assert [[name for name, _ in group["params"]] for group in groups] == [
        ["conv.weight", "mlp.weight"],
        ["long.weight", "normed.parametrizations.weight.original1"],
        ["normed.parametrizations.weight.original0"],
    ]
    found = seen_as(groups)
    assert [found[shape] for shape in ((3, 3, 5), (4, 3, 2, 2), (6, 7), (4, 4, 6))] == [()] * 4


def test_lazy_convolutions_are_no_stacks() -> None:
    model = nn.Sequential(nn.LazyConv1d(3, 5, bias=False))
    groups = param_groups(model)
    model(torch.ones(1, 3, 6))
    assert seen_as(groups) == {(3, 3, 5): ()}


def test_experts_are_stacks() -> None:
    """Also more of them than a matrix has rows; their biases are vectors."""
    experts = bare(up=(5, 4, 3), up_bias=(5, 4), few=(2, 4, 3))
    groups = param_groups(nn.ModuleDict({"experts": experts, "other": bare(up=(6, 4, 3))}))
    assert seen_as(groups) == {(5, 4, 3): (5,), (5, 4): (), (2, 4, 3): (2,), (6, 4, 3): ()}
    assert groups[-1]["params"][0][0] == "experts.up_bias"
    assert groups[-1]["weight_decay"] == 0.0


# ---- Names ---------------------------------------------------------------------------------------


def test_groups_without_names() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    named, unnamed = param_groups(model), param_groups(model, named=False)
    assert [[param for _, param in group["params"]] for group in named] == [
        group["params"] for group in unnamed
    ]
    assert "param_names" not in DyKAF(unnamed).param_groups[0]
