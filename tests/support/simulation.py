"""The methods as an eager simulation on a decoder of transformers: `x → x Q → selection → Qᵀ → dense linear`.

Independent of the package: module hooks, torch.topk and the recipe's numbers. This file may know module names.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


def keep_largest(x: Tensor, k: int) -> Tensor:
    """Zeroes all but the k entries of largest magnitude of every row; ties with the k-th stay."""
    magnitude = x.abs()
    threshold = magnitude.topk(k, dim=-1).values[..., -1:]
    return torch.where(magnitude >= threshold, x, torch.zeros_like(x))


def selected(x: Tensor, site: Any) -> Tensor:
    """What a site keeps of x [..., features], in its basis."""
    if site.selection == "top-k":
        return keep_largest(x, max(1, round((1 - site.sparsity) * x.shape[-1])))
    lowest = site.threshold * (x.square().mean(-1, keepdim=True).sqrt() if site.selection == "relative" else 1)
    return x * (x.abs() >= lowest)


def sparse_input(x: Tensor, site: Any, scale: Tensor | None = None, rotation: Tensor | None = None) -> Tensor:
    """What a linear sees under the method; x [..., features], after the norm's scale."""
    z = x if scale is None else x / scale
    z = z if rotation is None else z @ rotation.to(x.dtype)
    z = selected(z, site)
    z = z if rotation is None else z @ rotation.to(x.dtype).T
    return z if scale is None else z * scale


@contextlib.contextmanager
def simulated(model: torch.nn.Module, recipe: Any) -> Iterator[torch.nn.Module]:
    """Within the context, calls of `model` are sparse as `recipe` says, by hooks on its linears."""
    handles = []
    paths = {id(parameter): path for path, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        # a tied head goes by the first name of its weight
        site = recipe.sites.get(paths.get(id(module.weight))) if isinstance(module, torch.nn.Linear) else None
        if site is None:
            continue
        if site.selection == "gate":
            act = model.get_submodule(name.rsplit(".", 1)[0]).act_fn
            handles.append(act.register_forward_hook(lambda *given, site=site: selected(given[-1], site)))
            continue
        rotation = recipe.rotations[site.basis] if site.basis is not None else None
        scale = None
        if rotation is not None and site.kind != "head":
            layer = model.get_submodule(name.rsplit(".", 2)[0])
            norm = layer.input_layernorm if "attn" in name else layer.post_attention_layernorm
            scale = norm.weight.detach()

        def hook(
            _: torch.nn.Module,
            inputs: tuple[Tensor, ...],
            site: Any = site,
            scale: Tensor | None = scale,
            rotation: Tensor | None = rotation,
        ) -> tuple[Tensor]:
            return (sparse_input(inputs[0], site, scale, rotation),)

        handles.append(module.register_forward_pre_hook(hook))
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def divergence(model: torch.nn.Module, recipe: Any, batches: Sequence[Tensor]) -> float:
    """Mean KL(dense ‖ sparse) of next tokens over batches, in nats."""
    total = 0.0
    for ids in batches:
        dense = torch.log_softmax(model(ids).logits.double(), -1)
        with simulated(model, recipe):
            sparse = torch.log_softmax(model(ids).logits.double(), -1)
        total += float((dense.exp() * (dense - sparse)).sum(-1).mean())
    return total / len(batches)
