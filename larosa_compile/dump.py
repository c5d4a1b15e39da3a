"""`options={"dump": DIR}`: one folder per compiled graph, with what every stage made of it."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from torch.fx import Graph, Node

from larosa_compile.passes.graph import value
from larosa_compile.passes.plan import Plan


class GraphDump:
    """Writes what it is given into its folder; into nothing where there is none."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @classmethod
    def start(cls, directory: Path | None) -> "GraphDump":
        """A dump of the next graph: `directory`/graph_N, N counting up from what is there."""
        if directory is None:
            return cls(None)
        for number in itertools.count():
            folder = directory / f"graph_{number}"
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                continue
            return cls(folder)
        raise AssertionError

    @property
    def wanted(self) -> bool:
        """Whether there is a folder to write to."""
        return self._folder is not None

    def write(self, name: str, text: str) -> None:
        """Writes a file of that name."""
        if self._folder is not None:
            (self._folder / name).write_text(text.rstrip("\n") + "\n", encoding="utf-8")


def readable(graph: Graph) -> str:
    """One line per node: name, dtype and shape, operation, operands."""
    return "\n".join(_line(node) for node in graph.nodes)


def _line(node: Node) -> str:
    fake = value(node)
    kind = f": {str(fake.dtype).removeprefix('torch.')}[{', '.join(map(str, fake.shape))}]" if fake is not None else ""
    if node.op == "placeholder":
        return f"{node.name}{kind} = input"
    if node.op == "output":
        return f"return {node.args[0]}"
    operands = [*map(str, node.args), *(f"{name}={arg}" for name, arg in node.kwargs.items())]
    return f"{node.name}{kind} = {node.target}({', '.join(operands)})"


def readable_plan(plan: Plan) -> str:
    """Sites, streams node by node with their bases, every change of basis with its place, and what stays dense.

    Nodes are those of the analysed graph.
    """
    return "\n".join(_plan_lines(plan))


def _plan_lines(plan: Plan) -> Iterator[str]:
    yield "sites: kept of all inputs, in which basis"
    for site in plan.sites:
        paths = " + ".join(linear.path for linear in site.linears)
        source = f", reads the stream at {site.reader.source.name}" if site.reader else ""
        chosen = "" if site.selection.is_exact else f" on average, {site.selection}"
        yield f"  {paths}: {site.kept} of {site.group.features}{chosen} in {_named(site.basis)}{source}"
    for stream in plan.facts.streams:
        yield ""
        yield f"stream of {stream.features} features: node, basis"
        yield from (f"  {node.name}: {_named(plan.bases[node])}" for node in stream.nodes)
    yield ""
    yield "changes of basis: from, to, after which node, for whom, computed where"
    for change in plan.changes:
        users = ", ".join(user.name for user in change.users) or "the sites that read it"
        bases = f"{_named(change.start)} -> {_named(change.end)}"
        yield f"  {bases}: {change.source.name} for {users}: {change.place.value}"
    yield ""
    yield "stays dense"
    yield from (f"  {refusal.site}: {refusal.reason}" for refusal in plan.refusals)


def _named(basis: str | None) -> str:
    return "the model's own basis" if basis is None else basis
