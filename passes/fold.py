"""Rewrite 2: the weights of every site, folded and packed. Exact by itself.

The scale and shift of a norm, and the rotations next to a site, move into its weight, more exactly than it is stored:

    read:  b ← b + s W,  W ← Qᵀ diag(g) W      write:  W ← W Q,  b ← b Q      (W is [in, out], y = x W + b; method:
    folds 1 to 3; x is the activation before scale g and shift s)

Linears that read one activation become one product over their weights side by side, stored input-major so
that a dropped input is a row not read. Stacked weights (one per expert) keep their product and are folded in place.
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from larosa_compile.kernels.formats import WeightFormat
from larosa_compile.passes.algebra import Basis, Rotations, fold_bias, fold_weight, matrix
from larosa_compile.passes.bases import Place
from larosa_compile.passes.graph import aten, value
from larosa_compile.passes.linears import Linear
from larosa_compile.passes.norms import FeatureAffine
from larosa_compile.passes.parameters import Parameters
from larosa_compile.passes.plan import Plan, Site
from larosa_compile.passes.rewriting import FoldedTensor, GraphEditor
from larosa_compile.passes.rotate import OnlineRotation
from larosa_compile.passes.streams import StreamReader


@dataclass(frozen=True)
class LinearFold:
    """One linear with what moves into it: a norm's scale and shift and a rotation before it, a rotation after it."""

    linear: Linear
    affine: FeatureAffine | None
    read: Basis
    write: Basis


@dataclass(frozen=True)
class FoldedSite:
    """A site after folding: its products over one activation, and the basis its outputs are written in.

    A site of plain linears has one product, `mm(activation, weight)`; of stacked ones, a product each. form: of the
    weight that the product reads; None is the model's own dtype. selected: what a threshold left of the activation, or
    of its gate, once the site is sparse; None where there is no threshold.
    """

    site: Site
    activation: Node
    products: tuple[Node, ...]
    written: Basis
    form: WeightFormat | None = None
    selected: Node | None = None


def fold_sites(
    editor: GraphEditor, plan: Plan, online: list[OnlineRotation]
) -> tuple[list[FoldedSite], list[OnlineRotation]]:
    """Replaces each site's linears by products over folded weights.

    Returns the folded sites, and the rotations that stay online.
    """
    rotations = {(made.change.source, made.change.end): made for made in online}
    writes = {made.change.source: made for made in online if made.change.place is Place.WEIGHT}
    sites = []
    for site in plan.sites:
        folds = []
        for linear in site.linears:
            write = writes.get(linear.product)
            affine = site.reader.affine if site.reader else None
            folds.append(LinearFold(linear, affine, site.basis, write.change.end if write else None))
            if write:
                # the rotation of the output is in the weight now: whoever read it reads the linear itself
                write.result.replace_all_uses_with(linear.product)
        with editor.graph.inserting_before(site.linears[0].product):
            activation = _activation(editor, plan, site, rotations)
            fold = _fold_stacked if site.group.stacked else _fold_plain
            products = fold(editor, activation, folds)
        _look_up_in(editor, site, products[0])
        sites.append(FoldedSite(site, activation, products, folds[0].write))
    editor.drop_dead()
    alive = set(editor.graph.nodes)
    return sites, [made for made in online if made.product in alive]


def _activation(
    editor: GraphEditor, plan: Plan, site: Site, rotations: dict[tuple[Node, Basis], OnlineRotation]
) -> Node:
    """What the folded site reads: its stream in its basis, before any scale; or what its linears read."""
    reader, first = site.reader, site.linears[0]
    if reader is None:
        # not `group.activation`: a rotation, or the product of another site, may stand in its place by now
        operand = first.product.args[-2 if not site.group.stacked else 0]
        assert isinstance(operand, Node)
        return operand if site.basis is None else rotations[site.group.activation, site.basis].result
    operand = _in_basis(plan, reader, site.basis, rotations)
    if reader.affine:
        operand = editor.replay(reader.affine.path, operand)
    return editor.cast_like(operand, first.activation)


def _in_basis(
    plan: Plan, reader: StreamReader, basis: Basis, rotations: dict[tuple[Node, Basis], OnlineRotation]
) -> Node:
    """The stream node that a reader sees, in `basis`."""
    return reader.source if plan.bases[reader.source] == basis else rotations[reader.source, basis].result


def _look_up_in(editor: GraphEditor, site: Site, product: Node) -> None:
    """Makes embeddings read the folded weight [features, entries] of a head instead of a table of their own."""
    for lookup in site.lookups:
        table, weight = lookup.args[0], product.args[1]
        assert isinstance(table, Node)
        with editor.graph.inserting_before(lookup):
            lookup.replace_input_with(table, editor.call(f"{lookup.name}_table", aten.permute.default, weight, [1, 0]))


def _fold_plain(editor: GraphEditor, activation: Node, folds: list[LinearFold]) -> tuple[Node]:
    name = folds[0].linear.path
    weight = editor.folded_input(f"weight {name}", _packed_weight(folds))
    product = editor.call(f"product {name}", aten.mm.default, activation, weight)
    result = product
    if any(fold.linear.bias or (fold.affine and fold.affine.shifts) for fold in folds):
        bias = editor.folded_input(f"bias {name}", _packed_bias(folds))
        result = editor.call(f"biased {name}", aten.add.Tensor, product, bias)
    start = 0
    for fold in folds:
        end = start + fold.linear.out_features
        part = result
        if len(folds) > 1:
            part = editor.call(f"{fold.linear.product.name}_part", aten.slice.Tensor, result, 1, start, end)
        fold.linear.product.replace_all_uses_with(part)
        start = end
    return (product,)


def _fold_stacked(editor: GraphEditor, activation: Node, folds: list[LinearFold]) -> tuple[Node, ...]:
    for fold in folds:
        product, selection = fold.linear.product, fold.linear.selection
        weight = editor.folded_input(f"weight {fold.linear.path}", _stacked_weight(fold))
        if selection is not None:
            with editor.graph.inserting_before(product):
                assert callable(selection.target)
                chosen = f"{selection.name}_folded"
                weight = editor.call(chosen, selection.target, weight, *selection.args[1:], **selection.kwargs)
        product.args = (activation, weight, *product.args[2:])
    return tuple(fold.linear.product for fold in folds)


def _packed_weight(folds: list[LinearFold]) -> FoldedTensor:
    fake = value(folds[0].linear.product)
    assert fake is not None
    dtype, device = fake.dtype, fake.device
    rows, columns = folds[0].linear.in_features, sum(fold.linear.out_features for fold in folds)

    def build(parameters: Parameters, rotations: Rotations) -> torch.Tensor:
        return some(parameters, rotations, slice(0, columns))

    def some(parameters: Parameters, rotations: Rotations, chosen: slice) -> torch.Tensor:
        packed = torch.empty(rows, chosen.stop - chosen.start, dtype=dtype, device=device)
        end = 0
        for fold in folds:
            start, end = end, end + fold.linear.out_features
            first, last = max(start, chosen.start), min(end, chosen.stop)
            if first < last:
                out = packed[:, first - chosen.start : last - chosen.start]
                weight = fold.linear.weight.evaluate(parameters)
                _fold_into(out, fold, weight, parameters, rotations, slice(first - start, last - start))
        return packed

    return FoldedTensor(_key("weight", folds), _paths(folds), (rows, columns), dtype, device, build, columns=some)


def _stacked_weight(fold: LinearFold) -> FoldedTensor:
    linear, fake = fold.linear, value(fold.linear.product)
    assert fake is not None
    dtype, device = fake.dtype, fake.device
    shape = (linear.experts, linear.in_features, linear.out_features)

    def build(parameters: Parameters, rotations: Rotations) -> torch.Tensor:
        stack = torch.empty(shape, dtype=dtype, device=device)
        # one at a time: a whole stack in float64 would be four times the model's largest tensor
        for folded, weight in zip(stack, linear.weight.evaluate(parameters), strict=True):
            _fold_into(folded, fold, weight, parameters, rotations)
        return stack

    return FoldedTensor(_key("stack", [fold]), _paths([fold]), shape, dtype, device, build)


def _fold_into(
    out: torch.Tensor,
    fold: LinearFold,
    weight: torch.Tensor,
    parameters: Parameters,
    rotations: Rotations,
    columns: slice = slice(None),
) -> None:
    """columns: which of the folded weight's; a rotation of the outputs mixes all of the weight's into each."""
    scale = fold.affine.evaluate(parameters)[0] if fold.affine else None
    write = matrix(rotations, fold.write)
    if write is None:
        weight = weight[:, columns]
    else:
        write = write[:, columns]
    fold_weight(weight, scale, matrix(rotations, fold.read), write, out)


def _packed_bias(folds: list[LinearFold]) -> FoldedTensor:
    fake = value(folds[0].linear.product)
    assert fake is not None
    dtype, device = fake.dtype, fake.device
    columns = sum(fold.linear.out_features for fold in folds)

    def build(parameters: Parameters, rotations: Rotations) -> torch.Tensor:
        parts = []
        for fold in folds:
            bias, shift = fold.linear.bias, fold.affine.evaluate(parameters)[1] if fold.affine else None
            parts.append(
                fold_bias(
                    fold.linear.weight.evaluate(parameters),
                    bias.evaluate(parameters) if bias else None,
                    shift,
                    matrix(rotations, fold.write),
                )
            )
        return torch.cat(parts).to(device, dtype)

    return FoldedTensor(_key("bias", folds), _paths(folds), (columns,), dtype, device, build)


def _key(kind: str, folds: list[LinearFold]) -> str:
    parts = [f"{fold.linear.weight} + {fold.linear.bias} {fold.affine} {fold.read} -> {fold.write}" for fold in folds]
    return f"{kind} {value(folds[0].linear.product).dtype} " + " | ".join(parts)  # type: ignore[union-attr]


def _paths(folds: list[LinearFold]) -> tuple[str, ...]:
    paths = [path for fold in folds for path in (fold.linear.path, fold.linear.bias and fold.linear.bias.path)]
    paths += [path for fold in folds if fold.affine for path in fold.affine.parameter_paths]
    return tuple(dict.fromkeys(path for path in paths if path))
