"""A sequence-parallel plan from the tensor-parallel plan that a Hugging Face decoder carries.

Transformers' configurations say how tensor parallelism cuts each linear layer of a block (``base_model_tp_plan``). The
rest follows from the model. The residual stream is a shard from the entrance of the first block to the final norm, so
every norm, dropout and parameter that a block applies to it works on the shard. Modules between a colwise and a rowwise
layer work on this rank's heads. Norms are recognised by what they compute, not by their names. A module with no style
by these rules runs whole on every rank (style ``replicated``) where that is right. Else the model is refused with the
reason.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from ...nn.linear import _linear_features
from ..conversion import Conversion
from ..plans import STREAM_NAMES, ParallelPlan
from ..replacements import converted_norm
from .built_in_plans import built_in_plan
from .experts import are_experts, experts_form

#: Architectures (model_type) for which ``python -m bench coverage --models`` finds everything right (docs/models.md).
PROVEN = frozenset({
    "apertus", "arcee", "aria_text", "axk1", "axk2", "cohere", "cohere2", "cohere2_moe", "cohere_compass_text",
    "cwm", "deepseek_v2", "deepseek_v3", "deepseek_v32", "doge", "dots1", "ernie4_5", "ernie4_5_moe", "exaone4",
    "exaone_moe", "flex_olmo", "gemma", "gemma2", "gemma3_text", "gemma4_text", "gemma4_unified_text", "glm",
    "glm4", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt2", "gpt_neox", "gpt_oss", "granite", "granite_swa",
    "granitemoe_swa", "helium", "hrm_text", "hy_v3", "hyperclovax", "inkling_text", "jais2", "jamba", "kimi_linear",
    "laguna", "llama", "llama4_text", "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2",
    "minimax_m3_vl_text", "ministral", "ministral3", "mistral", "mixtral", "nanochat", "nemotron_h", "olmo",
    "olmo2", "olmo3", "olmo_hybrid", "olmoe", "phi", "phi3", "phi4_multimodal", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "seed_oss", "smollm3", "solar_open",
    "starcoder2", "vaultgemma", "youtu",
})  # fmt: skip

_COLWISE = ("colwise", "colwise_gather_output", "colwise_rep")
_ROWWISE = ("rowwise", "rowwise_split_input", "rowwise_rep")
_PARTIAL = ("replicated_with_grad_allreduce", "mla_kv_a_proj")  # whole on every rank, gradients summed
_ATTENTION = {f"layers.*.self_attn.{name}_proj": "rowwise" if name == "o" else "colwise" for name in "qkvo"}
#: What the carried plans of some architectures (model_type) leave out.
_LEFT_OUT = {
    "gpt_oss": {**_ATTENTION, "layers.*.self_attn.sinks": "colwise"},
    "jamba": {
        **_ATTENTION,
        "layers.*.feed_forward.gate_proj": "colwise",
        "layers.*.feed_forward.up_proj": "colwise",
        "layers.*.feed_forward.down_proj": "rowwise",
    },
    "nemotron_h": {
        **{name.replace("self_attn", "mixer"): style for name, style in _ATTENTION.items()},
        "layers.*.mixer.up_proj": "colwise",
        "layers.*.mixer.down_proj": "rowwise",
        "layers.*.mixer.shared_experts.up_proj": "colwise",
        "layers.*.mixer.shared_experts.down_proj": "rowwise",
    },
}
_LOCAL = "local_params"  # computes with plain tensors, as all modules do here
_ROUTERS = ("ep_router", "moe_router", "router")
_OF_EXPERTS = ("moe_tp_experts", "moe_experts", "grouped_gemm", "packed_colwise", "packed_rowwise")
#: Attributes by which attention code counts its heads.
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "num_kv_heads", "n_heads", "n_head")
#: Arguments of blocks, besides the residual stream, that hold a row for every position.
_ROW_ARGUMENTS = ("per_layer_input",)


def plan_from_model(conversion: Conversion) -> None:
    """Take the built-in plan of the model, else the derived one, where ``parallelize`` was given none."""
    if conversion.given_plan is not None:
        return
    model = conversion.model
    conversion.plan = built_in_plan(model) or derive_plan(model, conversion.region.ranks)
    conversion.trusted = getattr(getattr(model, "config", None), "model_type", None) in PROVEN


def derive_plan(model: nn.Module, ranks: int) -> ParallelPlan:
    """The plan for ``model`` on ``ranks`` ranks.

    Raises:
        ValueError: the model carries no tensor-parallel plan, or one from which no right plan follows; says why.
    """
    return _Derivation(model, ranks).plan()


class _WholeOnly(Exception):
    """The reason why a module can only run whole on every rank."""


class _Derivation:
    def __init__(self, model: nn.Module, ranks: int):
        self.model, self.ranks = model, ranks
        carried: dict[str, str] = getattr(model, "_tp_plan", None) or {}
        self.carried = {name: style for name, style in carried.items() if style != _LOCAL}
        kind = getattr(getattr(model, "config", None), "model_type", None)
        for name, style in _LEFT_OUT.get(kind or "", {}).items():
            self.carried |= {name: style, f"{getattr(model, 'base_model_prefix', 'model')}.{name}": style}
        if not self.carried:
            raise ValueError(
                f"plan: there is no built-in plan for {type(model).__name__} and it carries no tensor-parallel plan; "
                "pass one: {name pattern: style}, see seqpar_kernels.convert.plans"
            )
        self.styles: dict[str, str] = {}
        self.edges: dict[str, list[str]] = {}
        self.divided: dict[str, tuple[str, ...]] = {}
        self.assigned: dict[str, dict[str, int]] = {}
        self.cut: dict[str, tuple[str, ...]] = {}
        self.scattered: dict[str, tuple[str, ...]] = {}
        self.shared: set[tuple[str, ...]] = set()
        self.remarks: dict[str, str] = {}

    def plan(self) -> ParallelPlan:
        stacks = list(self._stacks())
        if not stacks:
            raise ValueError(
                f"plan: the tensor-parallel plan of {type(self.model).__name__} names no layer of its blocks; pass one"
            )
        for name, blocks in stacks:
            for block, module in blocks.named_children():
                self._block(f"{name}.{block}", module)
            self._ends(name, blocks)
        modules = Counter(_pattern(name) for name, _ in self.model.named_modules())
        styles = _collapsed(self.styles, modules)
        for pattern, kinds in _collapsed({n: "+".join(kinds) for n, kinds in self.edges.items()}, modules).items():
            styles[pattern] = "+".join(filter(None, [styles.get(pattern), kinds]))
        families = tuple(sorted(self.shared, key=lambda family: (-len(family), family)))
        return ParallelPlan(
            styles,
            _collapsed(self.divided, modules),
            families,
            assigned=_collapsed(self.assigned, modules),
            cut=_collapsed(self.cut, modules),
            scattered=_collapsed(self.scattered, modules),
            remarks=_collapsed(self.remarks, modules),
        )

    def _carried_style(self, name: str) -> str | None:
        return self.carried.get(_pattern(name))

    def _stacks(self) -> Iterator[tuple[str, nn.ModuleList]]:
        """The lists of blocks of the text decoder."""
        model: Any = self.model
        decoder: nn.Module = model.get_decoder() if hasattr(model, "get_decoder") else model
        inside = {id(module) for module in decoder.modules()}
        found: list[str] = []
        for name, module in self.model.named_modules():
            if not isinstance(module, nn.ModuleList) or id(module) not in inside:
                continue
            planned = any(pattern.startswith(_pattern(name) + ".*.") for pattern in self.carried)
            if planned and not any(name.startswith(other + ".") for other in found):
                found.append(name)
                yield name, module

    def _ends(self, name: str, blocks: nn.ModuleList) -> None:
        """Find where the residual stream of a stack is cut, and where it is gathered again."""
        self._edge(f"{name}.0", "scatter_input")
        owner_name, _, own = name.rpartition(".")
        siblings = list(self.model.get_submodule(owner_name).named_children())
        behind = siblings[[child for child, _ in siblings].index(own) + 1 :]
        norms = [child for child, module in behind if any(True for _ in module.parameters()) and _is_norm(module)]
        if len(norms) == 1:
            final = f"{owner_name}.{norms[0]}" if owner_name else norms[0]
            self.styles[final] = "norm"
            self._edge(final, "gather_output")
        else:  # a norm without parameters is also right on the whole sequence, where the model may use it again
            self._edge(f"{name}.{len(blocks) - 1}", "gather_output")

    def _edge(self, name: str, kind: str) -> None:
        self.edges.setdefault(name, []).append(kind)

    # --- a block: what it applies to the residual stream -----------------------------------------------------------

    def _block(self, name: str, block: nn.Module) -> None:
        mixture = [child for child, module in block.named_modules() if child and are_experts(module)]
        self._refuse_unknown(name, block, mixture)
        linears = [child for child, _ in block.named_children() if self._carried_style(f"{name}.{child}")]
        for child, module in block.named_children():
            full = f"{name}.{child}"
            if child in linears:
                continue
            if isinstance(module, nn.Dropout):
                self.styles[full] = "dropout"
            elif _is_norm(module):
                self.styles[full] = "norm"
            elif isinstance(module, nn.Linear):
                self.styles[full] = "sequence"
            elif any(path == child or path.startswith(f"{child}.") for path in mixture):
                self._mixture(full, module)
            elif child not in mixture and any("." not in path for path in mixture) and not self._cuts(full, module):
                self.styles[full] = "router"  # beside experts that the block calls itself
            elif any(True for _ in module.parameters()):
                self._container(full, module)
        if linears:
            raise ValueError(
                f"plan: {name} calls {', '.join(linears)} itself; only blocks made of attention and MLP modules have a "
                "derived plan"
            )
        rows = tuple(name for name in inspect.signature(block.forward).parameters if name in _ROW_ARGUMENTS)
        if rows:
            self.scattered[name] = rows
        if any(True for _ in block.parameters(recurse=False)):
            self.styles[name] = "own_parameters"

    def _refuse_unknown(self, name: str, block: nn.Module, mixture: list[str]) -> None:
        """Refuse what the carried plan cuts in a way that is not known here."""
        modules = [child for child, _ in block.named_modules() if child]
        params = [child for child, _ in block.named_parameters()]
        for child in (*modules, *params):
            full = f"{name}.{child}"
            style = self._carried_style(full)
            if any(f"{child}.".startswith(f"{experts}.") for experts in mixture):
                continue
            if style == "all_reduce" and mixture:  # a shared expert of 3-D weights: every rank runs it on its own rows
                continue
            if style in _OF_EXPERTS or child.rpartition(".")[2] == "experts":
                raise ValueError(
                    f"plan: {full} belongs to a mixture of experts that is not written for Transformers' experts "
                    "interface; a plan of your own that calls its module 'replicated' trains it whole on every rank"
                )
            if style is not None and style not in (*_COLWISE, *_ROWWISE, *_PARTIAL, *_ROUTERS):
                raise ValueError(f"plan: {full} has the tensor-parallel style {style!r}, which is not supported")

    def _cuts(self, name: str, module: nn.Module) -> bool:
        """Whether the carried plan cuts a layer inside."""
        found = (self._carried_style(f"{name}.{child}") for child, _ in module.named_modules() if child)
        return any(style in (*_COLWISE, *_ROWWISE) for style in found)

    # --- mixtures of experts ---------------------------------------------------------------------------------------

    def _mixture(self, name: str, module: nn.Module) -> None:
        """A module with experts, on the shard: router and what else treats rows one by one, experts, shared experts."""
        if are_experts(module):
            self._experts(name, module)
            return
        if any(True for _ in module.parameters(recurse=False)):
            self.styles[name] = "own_parameters"
        for child, inner in module.named_children():
            full = f"{name}.{child}"
            if any(are_experts(m) for m in inner.modules()):
                self._mixture(full, inner)
            elif isinstance(inner, nn.Dropout):
                self.styles[full] = "dropout"
            elif self._carried_style(full) in (*_COLWISE, *_ROWWISE):
                raise ValueError(f"plan: {name} calls {child} itself beside its experts, which no derived plan can cut")
            elif self._cuts(full, inner) and self._shared_expert(full, inner):
                continue
            elif any(True for _ in inner.parameters()):
                self.styles[full] = "router"

    def _experts(self, name: str, module: nn.Module) -> None:
        try:
            experts_form(module)
        except ValueError as error:
            raise ValueError(f"plan: {name}: {error}") from error
        self.styles[name] = "experts"

    def _shared_expert(self, name: str, module: nn.Module) -> bool:
        """Whether it can be cut as an MLP is; where not, every rank runs all of it on its own rows."""
        before = [dict(found) for found in (self.styles, self.edges, self.divided, self.assigned, self.cut)]
        shared = set(self.shared)
        try:
            _Container(self, name, module).settle()
        except _WholeOnly:
            self.styles, self.edges, self.divided, self.assigned, self.cut = before  # type: ignore[assignment]
            self.shared = shared
            return False
        self._edge(name, "rows")
        return True

    # --- attention, MLP: what lies between colwise and rowwise -----------------------------------------------------

    def _container(self, name: str, module: nn.Module) -> None:
        try:
            _Container(self, name, module).settle()
        except _WholeOnly as reason:
            for found in (self.styles, self.edges, self.divided, self.assigned, self.cut):
                for inner in [n for n in found if n == name or n.startswith(name + ".")]:
                    del found[inner]
            if not _is_on_sequence(module):
                raise ValueError(f"plan: {name}: {reason}, and its forward does not take the residual stream") from None
            self.styles[name] = "replicated"
            self.remarks[name] = f"runs whole on every rank: {reason}"


class _Container:
    """One attention or MLP module."""

    def __init__(self, derivation: _Derivation, name: str, module: nn.Module):
        self.of, self.name, self.module, self.ranks = derivation, name, module, derivation.ranks
        self.columns: dict[str, str] = {}  # relative name -> carried style
        self.rows: dict[str, str] = {}
        self.others: list[str] = []  # other modules with parameters of their own
        for child, inner in module.named_modules():
            style = derivation._carried_style(f"{name}.{child}") if child else None
            if style in _COLWISE:
                self.columns[child] = style
            elif style in _ROWWISE:
                self.rows[child] = style
            elif child and any(True for _ in inner.parameters(recurse=False)):
                self.others.append(child)

    def settle(self) -> None:
        if not self.columns or len(self.rows) != 1:
            raise _WholeOnly("the model's plan gives it no colwise layers that end in one rowwise layer")
        (row,) = self.rows
        forward = inspect.signature(self.module.forward).parameters
        attention = "attention_mask" in forward
        self.width = self._features(row)[0]  # features that enter the rowwise layer
        self._own_parameters()
        gathers = any(isinstance(self.module.get_submodule(child), nn.Linear) for child in self.others)
        for child, style in self.columns.items():
            self._style(child, self._column(child, style))
        self._style(row, "rowwise")
        if attention:
            self._heads()
        for child in self.others:
            self._other(child, gathers)
        if gathers:
            self.of._edge(self.name, "gather_input")
            return
        if len(forward) > 1:
            self.of._edge(self.name, "whole_input")
        family = tuple(child for child in self.columns if "." not in child)
        if len(family) > 1:
            self.of.shared.add(family)

    def _style(self, child: str, style: str) -> None:
        self.of.styles[f"{self.name}.{child}"] = style

    def _features(self, child: str) -> tuple[int, int]:
        """(in, out)"""
        module = self.module.get_submodule(child)
        try:
            return _linear_features(module)[:2]
        except ValueError as error:
            if not isinstance(module, nn.Linear):
                raise
            raise _WholeOnly(f"{child}: {str(error).removeprefix('module: ')}") from None

    def _own_parameters(self) -> None:
        """Cut the module's own parameters, if they have one entry for each head."""
        cut = []
        for param, value in self.module.named_parameters(recurse=False):
            if self.of._carried_style(f"{self.name}.{param}") not in _COLWISE or value.shape[0] % self.ranks:
                raise _WholeOnly(f"the model's plan does not cut its parameter {param!r} {tuple(value.shape)} by heads")
            cut.append(param)
        if cut:
            self.of.cut[self.name] = tuple(cut)

    def _column(self, child: str, style: str) -> str:
        """The colwise style, with the sections of a packed projection.

        The carried "colwise_gather_output" says that plain pieces would be wrong, or that a norm needs all heads. So
        only layouts that are known by their names are cut.
        """
        if style == "colwise":
            if isinstance(self.module.get_submodule(child), nn.Linear):
                self._features(child)
            return "colwise"
        short, out = child.rpartition(".")[2], self._features(child)[1]
        if short == "gate_up_proj" and out == 2 * self.width:
            return "colwise:2"
        if short == "qkv_proj" and (out - self.width) % 2 == 0 and hasattr(self.module, "head_dim"):
            self.of.divided[self.name] = ("config.num_attention_heads",)
            kv = (out - self.width) // 2
            return f"colwise:{self.width},{kv},{kv}"
        if short in ("q_proj", "k_proj", "v_proj"):
            return "colwise"
        raise _WholeOnly(f"how the output of {short} is laid out is not known")

    def _heads(self) -> None:
        """Divide head counts. Key/value heads that are fewer than ranks are shared by neighbours."""
        name, module, ranks = self.name, self.module, self.ranks
        config: Any = getattr(module, "config", None)
        heads = getattr(config, "num_attention_heads", None)
        if isinstance(heads, int) and heads % ranks:
            raise ValueError(f"num_attention_heads: expected a multiple of the {ranks} ranks of the group, got {heads}")
        counts = [attribute for attribute in _HEAD_COUNTS if isinstance(vars(module).get(attribute), int)]
        head_dim = getattr(module, "head_dim", None)
        kv_heads = self._features("k_proj")[1] // head_dim if "k_proj" in self.columns and head_dim else None
        if kv_heads is not None and kv_heads % ranks:
            if ranks % kv_heads:
                raise ValueError(
                    f"num_key_value_heads: expected a multiple or a divisor of the {ranks} ranks of the group, got "
                    f"{kv_heads}"
                )
            for child in ("k_proj", "v_proj"):
                if child in self.columns:
                    self._style(child, f"shared_heads:{kv_heads}")
            self.of.assigned[name] = {"num_key_value_groups": self.width // (head_dim or 1) // ranks}
            for attribute in [attribute for attribute in counts if vars(module)[attribute] == kv_heads != heads]:
                self.of.assigned[name][attribute] = 1
                counts.remove(attribute)
        divided = (*self.of.divided.get(name, ()), *counts)
        if divided:
            self.of.divided[name] = divided

    def _other(self, child: str, gathers: bool) -> None:
        """Find the style of a module between colwise and rowwise, or beside the colwise layers of a gathered input."""
        module = self.module.get_submodule(child)
        params = list(module.parameters(recurse=False))
        column = child.replace("norm", "proj")  # q_norm normalizes what q_proj puts out
        whole_width = column in self.columns and params[0].numel() == self._features(column)[1]
        if gathers or all(param.dim() == 1 for param in params):
            carried = self.of._carried_style(f"{self.name}.{child}")
            across = not gathers and whole_width and carried not in _PARTIAL
            shared = self.of.styles.get(f"{self.name}.{column}", "").startswith("shared_heads")
            if across and shared:
                raise _WholeOnly(f"{child} normalizes over heads that are fewer than ranks")
            self._style(child, "split_norm" if across else "tensor_parallel")
        elif whole_width and len(params) == 1 and params[0].shape[0] % self.ranks == 0:
            self.of.cut[f"{self.name}.{child}"] = tuple(n for n, _ in module.named_parameters(recurse=False))
        else:
            raise _WholeOnly(f"what its {child} does between colwise and rowwise is not known")


def _is_norm(module: nn.Module) -> bool:
    """Whether a fused norm computes the same. Without parameters, the name of the class must say that it is a norm."""
    if not any(True for _ in module.parameters()) and "norm" not in type(module).__name__.lower():
        return False
    try:
        converted_norm(module)
    except ValueError:
        return False
    return True


def _is_on_sequence(module: nn.Module) -> bool:
    first = next(iter(inspect.signature(module.forward).parameters.values()), None)
    return first is not None and first.kind != first.VAR_POSITIONAL and first.name in STREAM_NAMES


def _pattern(name: str) -> str:
    """The name with ``*`` for every number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _collapsed(found: dict[str, Any], modules: Counter[str]) -> dict[str, Any]:
    """Replace names that differ only in their numbers by one pattern, if it matches no other module."""
    values: dict[str, list[Any]] = {}
    for name, value in found.items():
        values.setdefault(_pattern(name), []).append(value)
    out: dict[str, Any] = {}
    for name, value in found.items():
        pattern = _pattern(name)
        alike = len(values[pattern]) == modules[pattern] and all(v == value for v in values[pattern])
        out[pattern if alike else name] = value
    return out
