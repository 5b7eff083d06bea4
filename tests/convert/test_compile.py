"""torch.compile of converted models: no graph break of ours, and what eager computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.registry import lookup_backend
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses import FakeTensorMode

import seqpar_kernels as sp

from ..world import World
from .models import VOCAB, assert_same_gradients, assert_same_loss, gpt2, group

pytest.importorskip("transformers")

from bench.zoo import small_model

DROPOUT = {"resid_pdrop": 0.2, "embd_pdrop": 0.2}


class Recorder:
    """The backend "aot_eager", and every graph it was given."""

    def __init__(self) -> None:
        torch._dynamo.reset()  # what other tests have compiled here counts against the limit of recompilations
        torch._dynamo.utils.counters.clear()
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        compiled = lookup_backend("aot_eager")(graph, examples)
        self.graphs.append(graph)  # not before: one that turns out to need no symbolic float is traced again
        return compiled

    def assert_one_graph(self, times: int = 1) -> None:
        """Compiled ``times`` times, never in pieces; a frame that dynamo gives up counts no break but makes more."""
        breaks = torch._dynamo.utils.counters["graph_break"]
        assert not breaks and len(self.graphs) == times, (len(self.graphs), breaks)


def some_ids(length: int, vocabulary: int = VOCAB) -> Tensor:
    return torch.randint(3, vocabulary, (2, length), generator=torch.Generator().manual_seed(length))


def step(model: nn.Module, call: Any, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and whole gradients; dropout draws the same at every call."""
    model.zero_grad()
    torch.manual_seed(11)
    loss = call(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), sp.gather_full_gradients(model)


def assert_same(got: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert_same_loss(got[0], expected[0])
    assert_same_gradients(got[1], expected[1])


def zoo_case(kind: str) -> None:
    ids = some_ids(13, 128)
    model: Any = sp.parallelize(small_model(kind, {}), group())
    model.loss_type = "ForCausalLM"  # a configuration without one makes transformers log, which breaks the graph
    record = Recorder()
    got = step(model, torch.compile(model, backend=record), ids)  # before any eager forward
    record.assert_one_graph()
    assert_same(got, step(model, model, ids))


@pytest.mark.parametrize("kind", ["gemma3_text", "olmo2", "phi3", "qwen3"])
def test_no_graph_break(world2: World, kind: str) -> None:
    world2.run(zoo_case, kind)


def inlined_case(loss_parallel: bool) -> None:
    """``model.compile()`` traces the hooks of the model itself too, and fullgraph allows no break anywhere."""
    ids = some_ids(13)
    model: Any = sp.parallelize(gpt2(**DROPOUT), group(), loss_parallel=loss_parallel)
    model.loss_type = "ForCausalLM"
    expected = step(model, model, ids)
    record = Recorder()
    model.compile(backend=record, fullgraph=True)
    for _ in range(2):
        assert_same(step(model, model, ids), expected)
    record.assert_one_graph()
    region = model._seqpar.region
    assert not region.summed


@pytest.mark.parametrize("loss_parallel", [False, True])
def test_hooks_of_the_model_are_traced_too(world2: World, loss_parallel: bool) -> None:
    world2.run(inlined_case, loss_parallel)


def lengths_case() -> None:
    """Lengths that do and do not divide, training with dropout, and evaluation, against the unsharded model."""
    model: Any = sp.parallelize(gpt2(**DROPOUT, n_layer=1), group())
    whole: Any = sp.parallelize(gpt2(**DROPOUT, n_layer=1), None)
    for each in (model, whole):
        each.loss_type = "ForCausalLM"
    record = Recorder()
    call = torch.compile(model, backend=record, dynamic=True)
    for length in (12, 13, 16, 17, 10, 9):
        ids = some_ids(length)
        got, expected = step(model, call, ids), step(whole, whole, ids)
        assert_same(got, expected)
    record.assert_one_graph(2)  # one for lengths that divide, one for the others
    model.eval(), whole.eval()
    for length in (12, 16, 10):
        ids = some_ids(length)
        with torch.no_grad():
            got_logits = call(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(got_logits, whole(input_ids=ids, use_cache=False).logits, rtol=1e-4, atol=1e-5)
    record.assert_one_graph(3)


def test_lengths_training_and_evaluation(world2: World) -> None:
    world2.run(lengths_case)


class ChangesInBetween(nn.Module):
    """Changes the input of q before k is given it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 16)
        self.q, self.k = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x) * 1.0
        q = self.q(y)
        y.mul_(2.0)
        return x + self.out(q * self.k(y))


def changes_case() -> None:
    plan = sp.ParallelPlan(
        {"block": "scatter_input+gather_output", "block.norm": "norm", "block.q": "colwise", "block.k": "colwise",
         "block.out": "rowwise"},
        shared=(("q", "k"),),
    )  # fmt: skip
    torch.manual_seed(0)
    whole = nn.ModuleDict({"block": ChangesInBetween()})
    whole.forward = lambda x: whole["block"](x)  # type: ignore[method-assign]
    x = torch.randn(2, 6, 16)
    with torch.no_grad():
        expected = whole(x)
        sp.parallelize(whole, group(), plan)
        torch.testing.assert_close(whole(x), expected)
        record = Recorder()
        torch.testing.assert_close(torch.compile(whole, backend=record, fullgraph=True)(x), expected)


def test_a_shared_gather_that_the_first_forward_saw_fail_is_not_shared(world2: World) -> None:
    world2.run(changes_case)


def assert_capturable(graph: torch.fx.GraphModule) -> None:
    """What reduce-overhead wants of a graph: no value goes to the host, and no argument is changed."""
    places = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node in graph.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        assert node.target is not torch.ops.aten._local_scalar_dense.default, node.format_node()
        assert node.target is not torch.ops.aten.nonzero.default, node.format_node()
        arguments = node.target._schema.arguments
        changed = [node.args[i] for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
        assert not set(changed) & set(places), node.format_node()


def capture_case(loss_parallel: bool) -> None:
    model: Any = sp.parallelize(gpt2(**DROPOUT, n_layer=1), group(), loss_parallel=loss_parallel)
    model.loss_type = "ForCausalLM"
    ids, graphs = some_ids(13), []

    def take(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    step(model, torch.compile(model, backend=aot_autograd(fw_compiler=take, bw_compiler=take)), ids)
    assert len(graphs) == 2  # forward, backward
    for graph in graphs:
        assert any("seqpar" in str(node.target) for node in graph.graph.nodes)
        assert_capturable(graph)
    plain: Any = gpt2(**DROPOUT, n_layer=1)
    plain.loss_type = "ForCausalLM"
    step(model, model, ids)  # the check of the first eager forward looks at values
    assert values_read(model, ids) <= values_read(plain, ids)  # Transformers asks for one, of the mask


def values_read(model: nn.Module, ids: Tensor) -> int:
    """How often an eager forward and backward ask for a value on the host, inside the ops too.

    Not counting the range checks of indices, which ask on a CPU only: ``_assert_async`` fails on the GPU itself.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    reads = [event for event in seen.events() if event.name == "aten::item"]
    return sum(event.cpu_parent is None or event.cpu_parent.name != "aten::_assert_async" for event in reads)


@pytest.mark.parametrize("loss_parallel", [False, True])
def test_nothing_goes_to_the_host_and_no_argument_changes(world2: World, loss_parallel: bool) -> None:
    world2.run(capture_case, loss_parallel)


def fake_cuda_case() -> None:
    """The forward with tensors of a GPU that is not there: nothing asks for a value, nothing comes from the CPU.

    Autograd cannot run on them; of the backward, the test above sees what is traced.
    """
    with FakeTensorMode():
        place: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        x, weight, wide, back = (torch.randn(*s, **place) for s in ((2, 8, 32), (32,), (24, 32), (32, 24)))
        y, z = sp.dropout_add_rms_norm(x, x, weight, p=0.1, prenorm=True, group=group())
        hidden = sp.all_gather_linear(y, wide, group=group())
        assert hidden.shape == (2, 16, 24)
        y, z = sp.linear_reduce_scatter_dropout_add_norm(
            hidden, back, residual=z, norm="rms", norm_weight=weight, p=0.1, group=group()
        )
        z = z + sp.linear_reduce_scatter(sp.all_gather_linear(y, wide, group=group()), back, group=group())
        whole = sp.gather_sequence(z, group())
        assert whole.device.type == "cuda" and whole.shape == (2, 16, 32)


def test_on_fake_gpu_tensors(world2: World) -> None:
    world2.run(fake_cuda_case)
