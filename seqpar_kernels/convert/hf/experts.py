"""The experts of Transformers' mixtures: what they compute, and the router's logits that leave a forward.

Transformers' classes of experts say how their weights lie (``use_experts_implementation``). What stands between the two
matmuls is found by trying it: the gate of the class on numbers of all sizes, against the activations of
:func:`seqpar_kernels.moe_mlp`.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...functional import gather_sequence
from ...kernels.expert_activation import EXPERT_ACTIVATIONS, ExpertActivation, activate_experts
from ...nn import ExpertForm, Experts
from ...nn.own_forward import trusted
from ...overlap.moe_routes import best_way
from ..conversion import Conversion

#: Attributes by which classes of experts name the constants of their gate.
_ALPHAS, _LIMITS = ("alpha", "swiglu_alpha"), ("limit", "swiglu_limit")
_SAMPLES = 96
_GATHERED = "_seqpar_all_tokens"


def are_experts(module: nn.Module) -> bool:
    """Whether ``module`` is written for Transformers' experts interface, or ours, or takes its rows by expert."""
    if isinstance(module, Experts) or _takes_rows_by_expert(module):
        return True
    return all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj"))


def _takes_rows_by_expert(module: Any) -> bool:
    """Whether ``module`` has the parameters and the argument of Llama 4's experts."""
    params = dict(module.named_parameters())
    if set(params) != {"gate_up_proj", "down_proj"} or hasattr(module, "has_gate") or not hasattr(module, "act_fn"):
        return False
    first, second = params["gate_up_proj"], params["down_proj"]
    if first.dim() != 3 or second.dim() != 3 or len(inspect.signature(module.forward).parameters) != 1:
        return False
    experts, inner, features = second.shape
    return tuple(first.shape) == (experts, features, 2 * inner)


@torch.no_grad()
def _form_by_expert(module: Any) -> ExpertForm:
    """The form of experts that take their rows by expert, tried on two rows of each.

    Raises:
        ValueError: it computes something else.
    """
    activation = _activation_of(module, lambda h: h.chunk(2, -1)[1] * module.act_fn(h.chunk(2, -1)[0]))
    first, second = module.gate_up_proj, module.down_proj
    rows = torch.linspace(-1, 1, first.shape[0] * 2 * first.shape[1]).sin().to(first.dtype).to(first.device)
    rows = rows.view(first.shape[0], 2, first.shape[1])
    expected = activate_experts((rows @ first).flatten(0, 1), activation).view(first.shape[0], 2, -1) @ second
    if not torch.allclose(module(rows.flatten(0, 1)).view(expected.shape), expected, rtol=1e-2, atol=1e-3):
        raise ValueError(f"{type(module).__name__} computes nothing that moe_mlp knows")
    return ExpertForm(activation, transposed=True, by_expert=True)


def experts_form(module: Any) -> ExpertForm:
    """What ``module`` computes.

    Raises:
        ValueError: nothing that :func:`seqpar_kernels.moe_mlp` does.
    """
    if isinstance(module, Experts):
        return module.form
    kind = type(module).__name__
    if not are_experts(module):
        raise ValueError(
            f"expected experts that are written for Transformers' experts interface (use_experts_implementation), or "
            f"seqpar_kernels.nn.Experts, got {kind}"
        )
    if _takes_rows_by_expert(module):
        return _form_by_expert(module)
    gated = bool(module.has_gate)
    activation = _activation_of(module, module._apply_gate if gated else module.act_fn, gated)
    form = ExpertForm(activation, bool(module.has_bias), bool(module.is_transposed))
    listed = {name for name, _ in module.named_parameters()}
    if listed != set(form.names()):
        raise ValueError(f"expected the parameters {sorted(form.names())}, {kind} has {sorted(listed)}")
    return form


@torch.no_grad()
def _activation_of(module: Any, applied: Callable[[Tensor], Tensor], gated: bool = True) -> ExpertActivation:
    """What ``applied`` computes of a first projection."""
    # Pairs of a gate and an up of all signs and sizes, also beyond limits; the last dimension is chunked or strided.
    line = torch.cat([torch.linspace(-30, 30, _SAMPLES // 2), torch.linspace(-2, 2, _SAMPLES // 2)]).double()
    h = torch.stack([line, line.flip(0), -line, line.roll(7)]) * 0.7
    try:
        expected = applied(h)
    except Exception as error:
        raise ValueError(f"its gate could not be tried: {type(error).__name__}: {error}") from error
    alphas = [1.0, *_numbers(module, _ALPHAS)]
    limits = [None, *_numbers(module, _LIMITS)]
    interleaved = [not getattr(module, "is_concatenated", True)] if gated else [False]
    shifts = [0.0, 1.0] if gated else [0.0]
    for name, alpha, limit, woven, shift in itertools.product(EXPERT_ACTIVATIONS, alphas, limits, interleaved, shifts):
        if (alpha != 1.0 and name != "silu") or (limit is not None and not gated):
            continue
        tried = ExpertActivation(name, gated, woven, alpha, limit, shift)
        if torch.allclose(activate_experts(h, tried), expected.double(), rtol=1e-6, atol=1e-9):
            return tried
    raise ValueError(f"the gate of {type(module).__name__} computes nothing that moe_mlp knows")


def _numbers(module: Any, names: tuple[str, ...]) -> Iterator[float]:
    for name in names:
        value = getattr(module, name, None)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield float(value)


def find_forms(conversion: Conversion) -> None:
    """Find what the modules of style 'experts' compute, and how they are divided.

    Raises:
        ValueError: a module whose experts cannot be converted; with ``"tp"`` an inner dimension that does not divide.
    """
    ranks = conversion.region.ranks
    for name, style in conversion.styles.items():
        if style != "experts":
            continue
        module: Any = conversion.model.get_submodule(name)
        try:
            form = experts_form(module)
        except ValueError as error:
            raise ValueError(f"{name}: style 'experts': {error}") from error
        count, inner = module.down_proj.shape[0], module.down_proj.shape[1 if form.transposed else 2]
        way, normalizes = conversion.experts, getattr(module, "has_post_expert_norm", False)
        if way == "auto":
            way = "ep" if normalizes else best_way(count, inner, ranks)
        if way == "tp" and inner % ranks:
            raise ValueError(
                f"{name}: expected a multiple of the {ranks} ranks for the columns of each expert's inner dimension, "
                f"got {inner}; experts='ep' leaves experts whole"
            )
        if way == "tp" and normalizes:
            raise ValueError(
                f"{name}: normalizes what each expert gives, which experts='tp' would have in parts; take experts='ep'"
            )
        conversion.expert_forms[name] = form, way


def gather_router_logits(conversion: Conversion) -> None:
    """Let ``output.router_logits`` be those of all tokens: what the model makes its auxiliary loss of.

    Every rank then computes the whole loss, and the gather's backward gives each rank the gradient of its own tokens.
    """
    model, region = conversion.model, conversion.region
    if region.group is None or not conversion.expert_forms:
        return

    def whole(logits: Any) -> Any:
        # A module around the one whose output this was first hands on the same tensors.
        if not isinstance(logits, Tensor) or logits.dim() < 2 or getattr(logits, _GATHERED, False):
            return logits
        rows = logits.unflatten(0, (*conversion.batch, -1)) if logits.dim() == 2 and conversion.batch else logits
        gathered = gather_sequence(rows, region.group, -2, seq_len=region.seq_len, tensor_parallel_output_grad=False)
        out = gathered.flatten(0, -2) if logits.dim() == 2 else gathered
        setattr(out, _GATHERED, True)
        return out

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        found = getattr(output, "router_logits", None)
        if found is not None:
            with trusted():
                output.router_logits = tuple(map(whole, found)) if isinstance(found, tuple | list) else whole(found)

    for module in {id(m): m for m in (model, *_around_blocks(model, conversion))}.values():
        module.register_forward_hook(hook)


def _around_blocks(model: nn.Module, conversion: Conversion) -> Iterator[nn.Module]:
    """Modules that hold every block with experts."""
    for name, module in model.named_modules():
        if name and all(expert.startswith(f"{name}.") for expert in conversion.expert_forms):
            yield module
