"""Rewrite 2: the weights of every site, folded and packed. Exact by itself.

Norm scales and the rotations next to a site move into its weight, in float64, rounded once:

    read:  W ← Qᵀ diag(g) W      write:  W ← W Q,  b ← b Q      (W is [in, out], y = x W + b; method: folds 1, 3)

Linears that read one activation become one product over their weights side by side, stored input-major so
that a dropped input is a row not read.
"""

from dataclasses import dataclass

import torch
from torch.fx import Node

from larosa_compile.passes.algebra import Basis, Rotations, fold_bias, fold_weight, matrix
from larosa_compile.passes.graph import aten, is_call, value
from larosa_compile.passes.linears import Linear
from larosa_compile.passes.norms import is_squared_length
from larosa_compile.passes.parameters import ParameterExpression, Parameters, parameter_expression
from larosa_compile.passes.plan import Plan, Site
from larosa_compile.passes.rewriting import FoldedTensor, GraphEditor
from larosa_compile.passes.rotate import OnlineRotation
from larosa_compile.passes.streams import StreamReader


@dataclass(frozen=True)
class LinearFold:
    """One linear with what moves into it: a norm's scale and a rotation on its input, a rotation on its output."""

    linear: Linear
    scale: ParameterExpression | None
    read: Basis
    write: Basis


@dataclass(frozen=True)
class FoldedSite:
    """A site after folding: its one product, and the basis its outputs are written in."""

    site: Site
    product: Node
    written: Basis


def fold_sites(
    editor: GraphEditor, plan: Plan, online: list[OnlineRotation]
) -> tuple[list[FoldedSite], list[OnlineRotation]]:
    """Replaces each site's linears by one `mm` over a folded weight.

    Returns the folded sites, and the rotations that stay online.
    """
    sites = [_fold_site(editor, plan, site, online) for site in plan.sites]
    _fold_tables(editor, online)
    editor.drop_dead()
    alive = set(editor.graph.nodes)
    return sites, [rotation for rotation in online if rotation.product in alive]


def _fold_site(editor: GraphEditor, plan: Plan, site: Site, online: list[OnlineRotation]) -> FoldedSite:
    group, reader = site.group, site.reader
    scale = reader.scale if reader else None
    folds = []
    for linear in group.linears:
        write = _only_rotation_of(linear.product, online)
        folds.append(LinearFold(linear, scale.scale if scale else None, site.basis, write.end if write else None))
        if write:
            # the rotation of the output is in the weight now: whoever read it reads the linear itself
            write.result.replace_all_uses_with(linear.product)

    first = group.linears[0].product
    with editor.graph.inserting_before(first):
        # not `group.activation`: a rotation, or the product of another site, may stand in its place by now
        activation = first.args[-2]
        assert isinstance(activation, Node)
        if reader:
            activation = _operand_in_basis(plan, reader, site.basis, online)
            activation = editor.replay(group.chain, activation) if scale else activation
            activation = editor.cast(activation, value(group.activation).dtype)  # type: ignore[union-attr]
        weight = editor.folded_input(f"weight {group.name}", _packed_weight(folds))
        product = editor.call(f"product {group.name}", aten.mm.default, activation, weight)
        result = product
        if any(linear.bias is not None for linear in group.linears):
            bias = editor.folded_input(f"bias {group.name}", _packed_bias(folds))
            result = editor.call(f"biased {group.name}", aten.add.Tensor, product, bias)
        start = 0
        for linear in group.linears:
            end = start + linear.out_features
            part = result
            if len(group.linears) > 1:
                part = editor.call(f"{linear.product.name}_part", aten.slice.Tensor, result, 1, start, end)
            linear.product.replace_all_uses_with(part)
            start = end
    return FoldedSite(site, product, folds[0].write)


def _only_rotation_of(product: Node, online: list[OnlineRotation]) -> OnlineRotation | None:
    """The rotation of a linear's output, if nothing else reads the unrotated output."""
    found = [rotation for rotation in online if rotation.source is product]
    return found[0] if len(found) == 1 and set(product.users) == {found[0].product} else None


def _operand_in_basis(plan: Plan, reader: StreamReader, basis: Basis, online: list[OnlineRotation]) -> Node:
    """What the reader sees, before the rotation back to the model's basis and before the norm's scale."""
    if plan.bases[reader.source] == basis:
        return reader.source
    return next(made.result for made in online if made.source is reader.source and made.end == basis)


def _packed_weight(folds: list[LinearFold]) -> FoldedTensor:
    fake = value(folds[0].linear.product)
    assert fake is not None
    rows, columns = folds[0].linear.in_features, sum(fold.linear.out_features for fold in folds)

    def build(parameters: Parameters, rotations: Rotations) -> torch.Tensor:
        packed = torch.empty(rows, columns, dtype=fake.dtype, device=fake.device)
        start = 0
        for fold in folds:
            weight = fold.linear.weight.evaluate(parameters)
            scale = fold.scale.evaluate(parameters) if fold.scale else None
            end = start + fold.linear.out_features
            packed[:, start:end] = fold_weight(
                weight, scale, matrix(rotations, fold.read), matrix(rotations, fold.write)
            )
            start = end
        return packed

    return FoldedTensor(_key("weight", folds), _paths(folds), (rows, columns), fake.dtype, fake.device, build)


def _packed_bias(folds: list[LinearFold]) -> FoldedTensor:
    fake = value(folds[0].linear.product)
    assert fake is not None
    columns = sum(fold.linear.out_features for fold in folds)

    def build(parameters: Parameters, rotations: Rotations) -> torch.Tensor:
        parts = [
            fold_bias(
                fold.linear.bias.evaluate(parameters) if fold.linear.bias else None,
                fold.linear.out_features,
                matrix(rotations, fold.write),
            )
            for fold in folds
        ]
        return torch.cat(parts).to(fake.device, fake.dtype)

    return FoldedTensor(_key("bias", folds), _paths(folds), (columns,), fake.dtype, fake.device, build)


def _fold_tables(editor: GraphEditor, online: list[OnlineRotation]) -> None:
    """Folds the rotation of looked-up rows into their table where the table is the smaller of the two.

    A vocabulary matrix never is: it would be stored twice to save reading one [features, features] matrix.
    """
    for rotation in online:
        lookup = rotation.source
        seen_by = {user for user in lookup.users if not is_squared_length(user, lookup)}
        if not is_call(lookup, aten.embedding.default) or not seen_by <= {rotation.product, rotation.product.args[0]}:
            continue
        operand = lookup.args[0]
        fake, table = value(operand), parameter_expression(operand, editor.source)
        if not isinstance(operand, Node) or fake is None or table is None or fake.shape[0] > fake.shape[1]:
            continue

        def build(
            parameters: Parameters,
            rotations: Rotations,
            table: ParameterExpression = table,
            end: Basis = rotation.end,
        ) -> torch.Tensor:
            rows = table.evaluate(parameters)
            return fold_weight(rows, write=matrix(rotations, end)).to(rows.dtype)

        key = f"table {table} -> {rotation.end}"
        folded = FoldedTensor(key, (table.path,), tuple(map(int, fake.shape)), fake.dtype, fake.device, build)
        lookup.replace_input_with(operand, editor.folded_input(f"table {table.path}", folded))
        rotation.result.replace_all_uses_with(lookup)


def _key(kind: str, folds: list[LinearFold]) -> str:
    parts = [f"{fold.linear.weight} + {fold.linear.bias} * {fold.scale} {fold.read} -> {fold.write}" for fold in folds]
    return f"{kind} {value(folds[0].linear.product).dtype} " + " | ".join(parts)  # type: ignore[union-attr]


def _paths(folds: list[LinearFold]) -> tuple[str, ...]:
    parts = [part for fold in folds for part in (fold.linear.weight, fold.linear.bias, fold.scale) if part]
    return tuple(dict.fromkeys(part.path for part in parts))
