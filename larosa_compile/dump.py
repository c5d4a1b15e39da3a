"""`options={"dump": DIR}`: one folder per compiled graph, a readable text file per pass and the report."""

import itertools
from pathlib import Path

from torch.fx import Graph, Node

from larosa_compile.passes.graph import value


class GraphDump:
    """Writes what it is given into its folder; into nothing where there is none."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._stages = itertools.count()

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

    def graph(self, stage: str, graph: Graph) -> None:
        """Writes `N_stage.txt`: the graph as that pass left it."""
        if self._folder is not None:
            self.text(f"{next(self._stages)}_{stage}", readable(graph))

    def text(self, name: str, text: str) -> None:
        if self._folder is not None:
            (self._folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")


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
