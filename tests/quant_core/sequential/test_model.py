"""Blocks of a model: which modules they are, their order, the groups of their layers, and models without."""

import contextlib

import pytest
import torch
from torch import nn

from learned_rounding.quant_core.sequential import UnfollowedModelError, find_blocks

from .models import WIDTH, Block, PairBlock, Pairs, Transformer, UNet, linear_layers, make, replay

BLOCK_GROUPS = (("q", "k", "v"), ("out",), ("mlp.0",), ("mlp.2",))
RESIDUAL_GROUPS = (("shortcut", "body"), ("time",))


def find(root: nn.Module, layers=None):
    model = replay(root)
    return find_blocks(model, list(model.layers) if layers is None else layers)


def names(blocks) -> list[str]:
    return [block.name for block in blocks]


def groups_of(block) -> tuple:
    """Groups without the name of the block."""
    return tuple(tuple(name.removeprefix(f"{block.name}.") for name in group) for group in block.groups)


def test_members_of_a_list_are_blocks_and_other_layers_are_outside():
    root = make(Transformer)
    blocks = find(root)
    assert names(blocks) == ["blocks.0", "blocks.1", "blocks.2"]
    assert [block.module for block in blocks] == list(root.blocks)
    inside = {name for block in blocks for name in block.layers}
    assert linear_layers(root).keys() - inside == {"embed", "modulation", "final"}


def test_layers_that_share_an_input_are_one_group_in_the_order_of_execution():
    assert [groups_of(block) for block in find(make(Transformer))] == [BLOCK_GROUPS] * 3
    assert find(make(Transformer))[0].layers == tuple(f"blocks.0.{name}" for group in BLOCK_GROUPS for name in group)


def test_only_layers_to_quantize_count():
    blocks = find(make(Transformer), ["blocks.0.k", "blocks.2.mlp.2", "final", "not in the model"])
    assert [(block.name, block.groups) for block in blocks] == [
        ("blocks.0", (("blocks.0.k",),)),
        ("blocks.2", (("blocks.2.mlp.2",),)),
    ]


def test_members_of_nested_lists_that_are_called_are_blocks():
    blocks = find(make(UNet))
    assert names(blocks) == [
        *("input_blocks.0", "input_blocks.1", "middle_block.0", "output_blocks.0", "output_blocks.1")
    ]
    inner = tuple(tuple(f"1.{name}" for name in group) for group in BLOCK_GROUPS)
    assert groups_of(blocks[0]) == (("0.shortcut", "0.body"), ("0.time",), *inner)
    assert groups_of(blocks[2]) == RESIDUAL_GROUPS


def test_children_of_members_are_blocks_where_the_model_calls_them():
    blocks = find(make(UNet, children=True))
    assert names(blocks) == [
        *("input_blocks.0.0", "input_blocks.0.1", "input_blocks.1.0"),
        *("middle_block.0", "output_blocks.0.0", "output_blocks.1.0"),
    ]


class InSequential(nn.Module):
    """Blocks in a Sequential that is called as a whole, and a Sequential of layers alone."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.body = nn.Sequential(Block(), Block())

    def forward(self, x, time):
        return self.body(self.embed(x))


def test_members_of_a_sequential_are_blocks_but_layers_alone_are_not():
    assert names(find(make(InSequential))) == ["body.0", "body.1"]


class Backwards(nn.Module):
    """Runs two lists in another order than they are registered in."""

    def __init__(self):
        super().__init__()
        self.late = nn.ModuleList(Block() for _ in range(2))
        self.early = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x, time):
        for block in (*reversed(self.early), *self.late):
            x = block(x)
        return x


def test_blocks_are_in_the_order_of_execution():
    assert names(find(make(Backwards))) == ["early.1", "early.0", "late.0", "late.1"]


class Unordered(nn.Module):
    """A block whose layers run in another order than they are registered in, one of them twice and one never."""

    def __init__(self):
        super().__init__()
        self.unused, self.last, self.twice, self.first = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        return self.last(self.twice(self.twice(self.first(x))))


class OneBlock(nn.Module):
    def __init__(self, block: nn.Module, times: int = 1):
        super().__init__()
        self.blocks, self.times = nn.ModuleList([block]), times

    def forward(self, x, time):
        for _ in range(self.times):
            x = self.blocks[0](x)
        return x


def test_layers_are_in_the_order_of_execution_and_those_that_do_not_run_are_outside():
    (block,) = find(make(lambda: OneBlock(Unordered())))
    assert groups_of(block) == (("first",), ("twice",), ("last",))


class Equal(nn.Module):
    """Layers with equal inputs that are not one tensor."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        return self.a(x) + self.b(x + 0) + self.c(x)


def test_layers_with_equal_but_separate_inputs_are_separate_groups():
    (block,) = find(make(lambda: OneBlock(Equal())))
    assert groups_of(block) == (("a", "c"), ("b",))


def test_block_that_is_called_by_another_is_part_of_it():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            return self.inner[1](self.inner[0](x))

    (block,) = find(make(lambda: OneBlock(Outer())))
    assert block.name == "blocks.0"
    assert groups_of(block) == tuple(
        tuple(f"inner.{index}.{name}" for name in group) for index in range(2) for group in BLOCK_GROUPS
    )


def test_blocks_with_several_outputs_are_found():
    assert [(block.name, type(block.module)) for block in find(make(Pairs))] == [
        ("blocks.0", PairBlock),
        ("blocks.1", PairBlock),
    ]


def test_block_that_is_called_twice_is_not_followed(sentences):
    with sentences.raises(UnfollowedModelError):
        find(make(lambda: OneBlock(Block(), times=2)))


class Shared(nn.Module):
    """Two blocks with one layer in common."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.blocks[1].out = self.blocks[0].out

    def forward(self, x, time):
        return self.blocks[1](self.blocks[0](x))


def test_layer_of_two_blocks_is_not_followed(sentences):
    with sentences.raises(UnfollowedModelError):
        find(make(Shared))


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), Block()

    def forward(self, x, time):
        return self.b(self.a(x))


def test_model_without_blocks_is_not_followed(sentences, subtests):
    for label, (root, layers) in {
        "no list": (Flat, None),
        "no layer in a list": (Transformer, ["embed", "final"]),
        "no layer": (Transformer, []),
    }.items():
        with subtests.test(label), sentences.raises(UnfollowedModelError):
            find(make(root), layers)


@pytest.mark.parametrize("tokens", [WIDTH, WIDTH + 1], ids=["success", "error in a block"])
def test_watching_leaves_no_hooks(tokens):
    root = make(Transformer)
    model = replay(root, run=lambda index: root.blocks[0](torch.zeros(1, 2, tokens)))
    with contextlib.suppress(RuntimeError):
        find_blocks(model, list(model.layers))
    for module in root.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
