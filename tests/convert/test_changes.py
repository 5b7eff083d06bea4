"""What changes in a converted model after its first forward is noticed."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import seqpar_kernels as sp

from ..world import World
from .models import assert_same_gradients, gpt2, group, llama

IDS = torch.randint(3, 11, (2, 9), generator=torch.Generator().manual_seed(7))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.gate, self.other_gate = nn.Parameter(torch.zeros(16)), nn.Parameter(torch.ones(16))
        self.drop, self.late_drop = nn.Dropout(0.0), nn.Dropout(0.3)
        self.use: set[str] = set()  # changes in place: no attribute shows it
        self.mode, self.act = "", torch.relu
        self.gated = False

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.down(self.act(self.up(self.norm(x)))))
        if "dropping" in self.use:
            y = self.late_drop(y)
        if self.mode == "mean":
            y = y - y.mean(1, keepdim=True)
        if self.mode == "dropout":
            y = nn.functional.dropout(y, 0.5)
        opening = self.other_gate
        y = y * opening if "opened" in self.use else y
        return x + (y * (1 + self.gate) if "gated" in self.use or self.gated else y)


class Net(nn.Module):
    """A user's model whose forward depends on flags."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.emb, self.head = nn.Embedding(11, 16), nn.Linear(16, 11)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.late, self.late_head, self.adapter = nn.LayerNorm(16), nn.Linear(16, 11), nn.Linear(32, 32)
        self.scale = nn.Parameter(torch.ones(()))
        self.skip: tuple[int, ...] = ()
        self.use: set[str] = set()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        if "late whole" in self.use:
            x = self.late(x)
        for i, block in enumerate(self.blocks):
            if i in self.skip:
                continue
            x = block(x)
            if i == 0 and "late" in self.use:
                x = self.late(x)
            if i == 0 and "scale" in self.use:
                x = x * self.scale
            if i == 0 and "twice" in self.use:
                x = block(x)
            if "table" in self.use:
                x = x + self.emb.weight[0]
        if "no norm" not in self.use:
            x = self.norm(x)
        out: Tensor = self.head(x)
        if "late head" in self.use:
            out = (out + self.late_head(x)) * self.scale
        return out


PLAN = {
    "blocks.0": "scatter_input", "blocks.*.norm": "norm", "blocks.*.up": "colwise", "blocks.*.down": "rowwise",
    "norm": "norm+gather_output",
}  # fmt: skip


def loss_of(model: Any, **options: Any) -> Tensor:
    if isinstance(model, Net):
        return nn.functional.cross_entropy(model(IDS).flatten(0, 1), IDS.flatten())
    loss: Tensor = model(input_ids=IDS, labels=IDS, **options).loss
    return loss


def each(name: str, value: Any) -> Callable[[Net], None]:
    return lambda net: [setattr(block, name, value) for block in net.blocks] and None


def each_uses(name: str) -> Callable[[Net], None]:
    return lambda net: [block.use.add(name) for block in net.blocks] and None  # type: ignore[union-attr, operator]


def use(*what: str) -> Callable[[Net], None]:
    return lambda net: net.use.update(what)


def set_drop(net: Net) -> None:
    net.blocks[1].drop.p = 0.3  # type: ignore[union-attr]


def replace_norm(net: Net) -> None:
    net.blocks[1].norm = nn.LayerNorm(16)


def hook_dropout(net: Net) -> None:
    net.blocks[1].register_forward_hook(lambda module, args, out: nn.functional.dropout(out, 0.3, True))


def prune_first(net: Net) -> None:
    net.blocks = net.blocks[1:]


def global_hook(net: Net) -> None:
    gain = torch.ones(16, requires_grad=True)
    remove = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * gain if isinstance(module, Block) else None
    )
    net.remove = remove.remove  # type: ignore[assignment]


def patch_class(net: Net) -> None:
    forward, adapter = Block.forward, net.adapter

    def patched(self: Block, x: Tensor) -> Tensor:
        return forward(self, x) + adapter(torch.cat([x, x], -1))[..., :16]

    Block.forward = patched  # type: ignore[method-assign]
    net.remove = lambda: setattr(Block, "forward", forward)  # type: ignore[assignment]


REFUSED: dict[str, tuple[Callable[[Net], None], str]] = {
    "a norm outside the plan": (use("late"), r"late\.weight: comes into play .*every rank.*plan"),
    "a gate": (each_uses("gated"), r"blocks\.0\.gate: comes into play .*every rank.*plan"),
    "a gate that was taken before": (each_uses("opened"), r"blocks\.\d\.other_gate: comes into play .*plan"),
    "a parameter of the model": (use("scale"), r"scale: comes into play .*every rank.*plan"),
    "the embedding's table": (use("table"), r"emb\.weight: comes into play .*every rank.*plan"),
    "a dropout outside the plan": (each_uses("dropping"), r"blocks\.0\.late_drop: comes into play .*'dropout'"),
    "another probability": (set_drop, r"blocks\.1\.drop: dropout on a sequence shard that the plan does not know"),
    "dropout in a hook": (hook_dropout, r"blocks\.1: dropout on a sequence shard that the plan does not know"),
    "the first block skipped": (
        lambda net: setattr(net, "skip", (0,)),
        r"blocks\.1: the sequence has not been cut .* blocks\.0, .*'scatter_input', took no part .*every forward calls",
    ),
    "all blocks skipped": (
        lambda net: setattr(net, "skip", (0, 1, 2)),
        r"norm: the sequence has not been cut .* blocks\.0, .*'scatter_input', took no part",
    ),
    "the first block pruned": (prune_first, r"the sequence has not been cut .* blocks\.0, .*Prune before parallelize"),
    "the last norm skipped": (use("no norm"), r"head.weight: comes into play .*has norm, where .* been left out"),
    "the first block twice": (use("twice"), r"blocks\.0: 'scatter_input' was given a sequence shard"),
    "a norm replaced": (replace_norm, r"blocks\.1\.norm: a sequence shard reaches parameter 'blocks\.1\.norm\.weight'"),
    "a hook on all modules": (global_hook, r"blocks\.0: a sequence shard meets a trainable tensor of shape \(16,\)"),
    "a gate by an attribute": (each("gated", True), r"blocks\.0: a sequence shard reaches parameter 'blocks\.0\.gate'"),
    "a mean over rows by an attribute": (each("mode", "mean"), r"blocks\.0: .*y\.mean\(1.* not treat rows one by one"),
    "dropout by an attribute": (each("mode", "dropout"), r"blocks\.0: dropout on a sequence shard that the plan"),
    "a softmax over features": (each("act", lambda h: h.softmax(-1)), r"blocks\.0\.down: .*it mixes them"),
    "a class patched": (patch_class, r"adapter: a sequence shard reaches parameter 'adapter\.weight'"),
}  # fmt: skip


def refused_case() -> list[str]:
    found = []
    for index, (way, (change, message)) in enumerate(REFUSED.items()):
        model = sp.parallelize(Net(), group(), PLAN).train()
        if index % 2:  # evaluated before
            loss_of(model.eval())
            model.train()
        loss_of(model).backward()
        change(model)
        try:
            for _ in range(2):  # trying again does not help
                with pytest.raises(RuntimeError, match=message) as caught:
                    loss_of(model).backward()
        finally:
            getattr(model, "remove", lambda: None)()
        found.append(re.sub(r"rows \d+\.\.\d+", "rows", f"{way}: {caught.value}"))
    return found


def test_what_comes_into_play_later_is_refused_by_name(world2: World) -> None:
    errors = world2.run(refused_case)
    assert errors[0] == errors[1] and len(errors[0]) == len(REFUSED)


def shards_case() -> None:
    model = sp.parallelize(Net(), group(), PLAN).eval()
    with torch.no_grad():
        model(IDS)
        use("no norm")(model)
        with pytest.raises(
            RuntimeError, match=r"was cut, but not put together .*norm, .*'gather_output', took no part"
        ):
            model(IDS)


def test_shards_are_not_returned(world2: World) -> None:
    world2.run(shards_case)


def prune_second(net: Net) -> None:
    net.blocks = nn.ModuleList([net.blocks[0], net.blocks[2]])


RIGHT: dict[str, Callable[[Net], None]] = {
    "an inner block skipped": lambda net: setattr(net, "skip", (1,)),
    "the last block skipped": lambda net: setattr(net, "skip", (2,)),
    "an inner block pruned": prune_second,
    "a head where the sequence is whole": use("late head"),
    "a norm where the sequence is whole": use("late whole"),
    "a hook that looks on": lambda net: net.blocks[1].register_forward_hook(lambda *_: None) and None,
    "a frozen gate": lambda net: [b.gate.requires_grad_(False) for b in net.blocks] and each_uses("gated")(net),  # type: ignore
    "a gate in a plan": each_uses("gated"),
    "another activation": each("act", torch.tanh),
}


def right_case() -> None:
    for way, change in RIGHT.items():
        plan = {**PLAN, "blocks.*": "own_parameters"} if way == "a gate in a plan" else PLAN
        found = []
        for model in (Net(), sp.parallelize(Net(), group(), plan)):
            for _ in range(2):
                loss_of(model).backward()
            change(model)
            for _ in range(2):
                model.zero_grad()
                loss_of(model).backward()
            penalties = [block.other_gate for block in model.blocks]  # type: ignore
            sum(p.square().sum() for p in penalties).backward()  # type: ignore[union-attr]
            found.append(model)
        expected = {name: p.grad for name, p in found[0].named_parameters() if p.grad is not None}
        assert_same_gradients(sp.gather_full_gradients(found[1]), expected)


def test_changes_that_stay_right(world2: World) -> None:
    world2.run(right_case)


def pruned_case() -> None:
    for build, path in ((llama, "model.layers"), (gpt2, "transformer.h")):
        for drop in (0, 1):
            found: list[Any] = []
            for model in (build(num_hidden_layers=3), sp.parallelize(build(num_hidden_layers=3), group())):
                model.train()
                for m in model.modules():
                    if isinstance(m, nn.Dropout):
                        m.p = 0.0
                loss_of(model, use_cache=False).backward()
                model.zero_grad()
                parent, _, name = path.rpartition(".")
                layers = model.get_submodule(path)
                kept = nn.ModuleList(layer for i, layer in enumerate(layers) if i != drop)  # type: ignore[arg-type]
                setattr(model.get_submodule(parent), name, kept)
                model.config.num_hidden_layers = 2  # type: ignore[union-attr]
                found.append(model)
            loss_of(found[0], use_cache=False).backward()
            if build is llama and drop == 0:
                with pytest.raises(RuntimeError, match=r"not been cut .*model\.layers\.0.*Prune before parallelize"):
                    loss_of(found[1], use_cache=False)
                continue
            loss_of(found[1], use_cache=False).backward()
            expected = {name: p.grad for name, p in found[0].named_parameters()}
            assert_same_gradients(sp.gather_full_gradients(found[1]), expected)


def test_layers_pruned_after_conversion(world2: World) -> None:
    """Right, or refused where the sequence was cut at the layer."""
    world2.run(pruned_case)


def leaf_net(way: str) -> tuple[Net, Tensor, Callable[[], None]]:
    """A model with a vector in a hook that is there when the model is checked, and what has it trained later."""
    net, late = Net(), torch.linspace(0.5, 1.5, 16)
    held = {"vector": late, "on": way not in ("a flag", "whole")}
    if way in ("a flag", "whole", "copied"):
        late.requires_grad_()

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        vector = held["vector"]
        if way == "copied" and isinstance(group(), dist.ProcessGroup) and hasattr(net, "_seqpar"):
            vector = sp.copy_to_tensor_parallel(vector, group())
        return out * vector if held["on"] else out

    def change() -> None:
        held["on"] = True
        if way == "another":
            held["vector"] = late.clone().requires_grad_()
        late.requires_grad_()

    (net.head if way == "whole" else net.blocks[1]).register_forward_pre_hook(lambda m, args: (hook(m, args, args[0]),))
    return net, late, change


def late_leaf_case() -> list[str]:
    found = []
    for way, wait in (("thawed", 0), ("a flag", 2), ("another", 0), ("thawed", 5)):
        net, _, change = leaf_net(way)
        model = sp.parallelize(net, group(), PLAN)
        for _ in range(1 + wait):
            loss_of(model).backward()
        change()
        for forward in range(8):
            try:
                loss_of(model).backward()
            except RuntimeError as error:
                found.append(f"{forward} {error}")
                break
        assert re.search(r"norm: a trainable tensor of shape \(16,\) .*a hook.* for the first time", found[-1]), found
    for way in ("whole", "copied"):
        gradients = []
        for parallel in (False, True):
            net, late, change = leaf_net(way)
            model = sp.parallelize(net, group(), PLAN) if parallel else net
            loss_of(model).backward()
            change()
            late.grad = None
            for _ in range(4):
                loss_of(model).backward()
            gradients.append(late.grad)
        torch.testing.assert_close(gradients[1], gradients[0])
    return found


def test_tensors_outside_the_model_that_are_trained_later(world2: World) -> None:
    errors = world2.run(late_leaf_case)
    assert errors[0] == errors[1] and len(errors[0]) == 4


def attributes_case() -> list[int]:
    """Forwards that are checked: again for what has changed, and not for what counts or was checked before."""
    from seqpar_kernels.convert.shard_check import ShardCheck

    start, calls = ShardCheck.start, []
    ShardCheck.start = lambda self, *args: calls.append(1) or start(self, *args)  # type: ignore
    found = []
    try:
        net = Net()
        for block in net.blocks:
            block.steps = 0  # type: ignore[assignment]
            block.register_forward_hook(lambda b, *_: setattr(b, "steps", b.steps + 1))
        model = sp.parallelize(net, group(), PLAN)
        for _ in range(5):
            loss_of(model).backward()
        found.append(len(calls))  # twice: each block counts its steps
        for act in (torch.tanh, torch.relu, torch.tanh, torch.relu):
            each("act", act)(model)
            loss_of(model).backward()
        found.append(len(calls))
        for step in range(20):
            each("temperature", float(step))(model)
            loss_of(model).backward()
        found.append(len(calls))
        for _ in range(3):
            for training in (False, True):
                loss_of(model.train(training)).backward()
        found.append(len(calls))
        each("act", lambda h: h.softmax(-1))(model)
        with pytest.raises(RuntimeError, match="softmax"):
            loss_of(model)
        each("act", torch.relu)(model)
        if dist.get_rank() == 0:  # a check of one rank alone keeps nobody waiting
            each("act", torch.sigmoid)(model)
            each("act", lambda h: torch.relu(h))(model)
        loss_of(model).backward()
    finally:
        ShardCheck.start = start  # type: ignore[method-assign]
    return found


def test_attributes_are_looked_at(world2: World) -> None:
    assert world2.run(attributes_case) == [[2, 3, 11, 12]] * 2


def checks_case() -> int:
    """Nothing is checked again where nothing has changed."""
    from seqpar_kernels.convert.shard_check import ShardCheck

    start, calls = ShardCheck.start, []
    ShardCheck.start = lambda self, *args: calls.append(1) or start(self, *args)  # type: ignore
    try:
        model = sp.parallelize(llama(), group())
        for _ in range(3):
            for training in (True, False):
                loss_of(model.train(training)).backward()
        with torch.no_grad():
            loss_of(model)
        assert len(calls) == 2
        handle = model.register_forward_hook(lambda *_: None)
        loss_of(model)
        loss_of(model)
        assert len(calls) == 3
        handle.remove()
        loss_of(model)
        model.to(torch.float64)
        loss_of(model)
    finally:
        ShardCheck.start = start  # type: ignore[method-assign]
    return len(calls)


def test_nothing_is_checked_twice_without_need(world2: World) -> None:
    assert world2.run(checks_case) == [4, 4]


def skipped_case() -> None:
    """Blocks that the checked forward left out, with dropout on the heads."""
    found = []
    for model in (gpt2(n_layer=3, attn_pdrop=0.3), sp.parallelize(gpt2(n_layer=3, attn_pdrop=0.3), group())):
        model.train()
        for m in model.modules():
            if isinstance(m, nn.Dropout) and m.p == 0.1:
                m.p = 0.0
        block: Any = model.transformer.h[1]  # type: ignore[union-attr, index]
        forward, skipping = type(block).forward, [True]
        block.forward = lambda x, *args, b=block, f=forward, s=skipping, **options: (
            x if s[0] else f(b, x, *args, **options)
        )
        loss_of(model, use_cache=False).backward()
        skipping[0] = False
        loss_of(model, use_cache=False).backward()
        found.append(model)
    assert all(p.grad is not None for p in found[1].parameters())


def test_blocks_skipped_at_first(world2: World) -> None:
    world2.run(skipped_case)
