"""graph(): autograd's graph from the outer loss to named inputs, with a node per step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from diffopt import _modes, _tree
from diffopt._arguments import check_type
from diffopt._tree import Tree
from diffopt.inspect import _plots
from diffopt.inspect._run import Region, region_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Node(NamedTuple):
    """A box of the picture.

    Attributes:
        kind: what it represents.
        name: its label.
        loop: the index of a step's loop, in the order in which loops were run.
        first: a step's number; the first of several steps in one box.
        last: the last of them.
        whole: whether it is a loop whose steps cannot be distinguished.
    """

    kind: Literal["outer", "step", "input"]
    name: str
    loop: int = 0
    first: int = 0
    last: int = 0
    whole: bool = False


OUTER = Node("outer", "outer")


@dataclass(frozen=True)
class Graph:
    """Which nodes feed which, in the direction of computation; prints as one line per input.

    Attributes:
        inputs: all inputs, whether reached or not.
        steps: the steps of the loops, in order.
        edges: pairs of nodes; the second one is computed from the first.
        leaves: all leaves of the graph, whether inputs or not.
    """

    inputs: tuple[Node, ...]
    steps: tuple[Node, ...]
    edges: frozenset[tuple[Node, Node]]
    leaves: tuple[Tensor, ...]

    def feeds(self, name: str) -> list[Node]:
        """The steps, inputs and outer loss that are computed directly from an input.

        Args:
            name: the input's name. An input that feeds nothing has no meta-gradient.

        Raises:
            KeyError: no input has that name.
        """
        sources = [node for node in self.inputs if node.name == name]
        if not sources:
            raise KeyError(f"no input is called {name!r}, only {[x.name for x in self.inputs]}")
        order = {node: i for i, node in enumerate((*self.steps, *self.inputs, OUTER))}
        return sorted((y for x, y in self.edges if x == sources[0]), key=order.__getitem__)

    def merged(self) -> Graph:
        """The graph with one box for consecutive steps that have the same neighbors."""
        boxes = _boxes(self.steps, self._alike)
        pairs = {(boxes.get(x, x), boxes.get(y, y)) for x, y in self.edges}
        edges = frozenset((x, y) for x, y in pairs if x != y)
        return replace(self, steps=tuple(dict.fromkeys(boxes.values())), edges=edges)

    def _alike(self, step: Node, after: Node) -> bool:
        """Whether two steps have the same neighbors, apart from those in their loop."""
        if not _adjacent(step, after):
            return False
        others = [(x, y) for x, y in self.edges if not _adjacent(x, y)]
        sources, sources_after = ({x for x, y in others if y == node} for node in (step, after))
        targets, targets_after = ({y for x, y in others if x == node} for node in (step, after))
        last = not any(x == after and _adjacent(x, y) for x, y in self.edges)
        return sources == sources_after and (targets == targets_after or last)

    @property
    def dot(self) -> str:
        """The picture in the DOT language of Graphviz."""
        ids = {node: f"n{i}" for i, node in enumerate((*self.inputs, *self.steps, OUTER))}
        lines = ["digraph {", "  rankdir=LR;"]
        for node, identity in ids.items():
            label = node.name.replace("\\", "\\\\").replace('"', '\\"')
            style = f"shape={_SHAPES[node.kind]}" + ", style=dashed" * self._lost(node)
            lines.append(f'  {identity} [label="{label}", {style}];')
        lines += sorted(f"  {ids[x]} -> {ids[y]};" for x, y in self.edges)
        return "\n".join([*lines, "}"])

    def plot(self) -> Figure:
        """Draw the graph: one row per loop, inputs below, dashed if they feed nothing.

        With more than 20 steps, `merged()` is drawn.

        Returns:
            A `matplotlib.figure.Figure`; a notebook shows it, `savefig` writes it.

        Raises:
            ImportError: matplotlib is missing; `pip install 'torch-diffopt[plots]'`.
        """
        shown = self.merged() if len(self.steps) > _MOST_STEPS else self
        places = shown._places()
        width = max(x for x, _ in places.values()) + 1
        height = max(y for _, y in places.values()) + 1
        inches = 0.6 + 0.08 * max(len(node.name) for node in places)  # between boxes
        figure, (axes,) = _plots.subplots(1, (inches * width + 0.5, height + 0.5))
        boxes: dict[Node, Any] = {}
        for node, (x, y) in places.items():
            line, color = ("dashed", "gray") if shown._lost(node) else ("solid", "black")
            style = {"boxstyle": _BOXES[node.kind], "facecolor": "white", "linestyle": line}
            box = axes.text(x, y, node.name, ha="center", va="center", bbox=style, color=color)
            boxes[node] = box.get_bbox_patch()
        for source, target in shown.edges:
            (x, y), (u, v) = places[source], places[target]
            around = abs(u - x) > 1 if y == v else abs(v - y) > 1  # the boxes in between
            arrow = {
                "arrowstyle": "->", "patchA": boxes[source], "patchB": boxes[target],
                "shrinkA": 0, "shrinkB": 1,
                "connectionstyle": f"arc3,rad={-0.8 / (2 + abs(u - x)) if around else 0}",
            }  # fmt: skip
            axes.annotate("", (u, v), (x, y), arrowprops=arrow)
        axes.set(xlim=(-0.6, width - 0.4), ylim=(-0.4, height - 0.2))
        axes.set_axis_off()
        return figure

    def __str__(self) -> str:
        width = max((len(node.name) for node in self.inputs), default=0)
        lines: list[str] = []
        for node in self.inputs:
            boxes = _boxes(self.feeds(node.name), _adjacent).values()
            names = ", ".join(dict.fromkeys(box.name for box in boxes))
            lines.append(f"{node.name:{width}} -> {names or 'nothing'}")
        return "\n".join(lines)

    def _lost(self, node: Node) -> bool:
        """Whether it is an input that feeds nothing."""
        return node.kind == "input" and all(x != node for x, _ in self.edges)

    def _places(self) -> dict[Node, tuple[float, float]]:
        """Loops in rows from the top, the outer loss to their right, inputs in the bottom row."""
        loops = max((step.loop for step in self.steps), default=0)
        places: dict[Node, tuple[float, float]] = {}
        for step in self.steps:
            column = sum(other.loop == step.loop for other in places)
            places[step] = (float(column), 1.0 + loops - step.loop)
        width = max((x for x, _ in places.values()), default=-1.0) + 1
        places[OUTER] = (width, 1.0 + loops / 2)

        def middle(node: Node) -> float:
            columns = [places[y][0] for x, y in self.edges if x == node and y in places]
            return sum(columns) / len(columns) if columns else width

        gap = max(1.0, width / max(1, len(self.inputs)))
        row = enumerate(sorted(self.inputs, key=middle))
        return places | {node: (i * gap, 0.0) for i, node in row}


def graph(outer: Tensor, inputs: Tree) -> Graph:
    """The graph from an outer loss to named inputs, with one node for each step of a loop.

    It is autograd's graph, before or after the backward pass. To autograd, a part of a tensor such
    as `sol.losses[2]` depends on everything that the tensor depends on. The steps of a loop are
    distinguished if it was run with a `Trace`; a loop whose steps are recomputed, as by
    `Checkpointed`, is one node, and a loop that was not traced is part of the outer loss. An input
    that feeds nothing gets no gradient: it was not used, or it was detached.

    Args:
        outer: the tensor that is differentiated.
        inputs: a pytree of the tensors it is differentiated with respect to, such as
            `{"lr": lr, "params": params}`; or a module, for the parameters that it trains.

    Returns:
        A `Graph` to print, to `plot()`, or to pass to Graphviz as `dot`. `merged()` has fewer
        boxes if there are many steps.

    Raises:
        TypeError: `outer` is not a tensor.
        ValueError: `outer` does not require a gradient, so there is no graph.
        RuntimeError: under a torch.func transform.

    Examples:
        >>> import torch, diffopt
        >>> opt = diffopt.sgd()
        >>> inputs = {name: torch.tensor(0.1, requires_grad=True) for name in ("w", "lr", "decay")}
        >>> sol = diffopt.minimize(
        ...     lambda w: w**2, inputs["w"], optimizer=opt, hparams=opt.hparams(lr=inputs["lr"]),
        ...     steps=4, adjoint=diffopt.inspect.Trace(),
        ... )
        >>> print(diffopt.inspect.graph(sol.params, inputs))
        w     -> step 0
        lr    -> steps 0-3
        decay -> nothing
    """
    check_type(outer, Tensor, "outer", "the tensor that is differentiated")
    if _modes.transformed():
        raise RuntimeError("graph() requires autograd: torch.func transforms hide their graphs")
    if not outer.requires_grad:
        raise ValueError(
            "outer does not require a gradient: it depends on nothing that does, or was "
            "computed under torch.no_grad() or from detached tensors"
        )
    names = named(_tree.plain(_tree.trained(inputs)))
    starts: dict[Any, list[Node]] = {}
    for name, leaf in names:
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            starts.setdefault(get_gradient_edge(leaf)[:2], []).append(Node("input", name))
    pairs, leaves = _walk(outer, {edge: tuple(nodes) for edge, nodes in starts.items()})
    nodes = _step_nodes({x for pair in pairs for x in pair if isinstance(x, Region)})

    def nodes_of(region: Any) -> tuple[Node, ...]:
        return (nodes[region],) if isinstance(region, Region) else region

    return Graph(
        tuple(Node("input", name) for name, _ in names),
        tuple(sorted(nodes.values(), key=lambda node: (node.loop, node.first))),
        frozenset((x, y) for a, b in pairs for x in nodes_of(a) for y in nodes_of(b)),
        tuple(leaves),
    )


def named(inputs: Tree) -> list[tuple[str, Any]]:
    """Name and value of every leaf: `lr` and `params['w']` of `{"lr": ..., "params": {...}}`."""
    if type(inputs) is dict and all(isinstance(key, str) for key in inputs):
        leaves = [pair for key, child in inputs.items() for pair in _tree.named(child, key)]
    else:
        leaves = _tree.named(inputs, "inputs")
    if not leaves:
        raise ValueError(f"inputs is {inputs!r}, which holds no tensor")
    for name, leaf in leaves:
        if not isinstance(leaf, (Tensor, float, int, type(None))) or isinstance(leaf, bool):
            raise TypeError(f"{name} of the inputs is {_tree.describe(leaf)}, not a tensor")
    return leaves


def _walk(outer: Tensor, starts: dict[Any, tuple[Node, ...]]) -> tuple[set[Any], list[Tensor]]:
    """The pairs of regions between which edges run, and the leaves.

    A region is the part of the graph behind the mark of a step, behind inputs, or behind neither.
    """
    edge = get_gradient_edge(outer)[:2]
    first: Any = starts.get(edge) or region_of(edge[0]) or (OUTER,)
    pairs: set[Any] = {(first, (OUTER,))} if first != (OUTER,) else set()
    leaves: dict[Any, Tensor] = {}
    seen = {(first, edge[0])}
    todo = list(seen)
    while todo:
        region, node = todo.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves[node] = variable
        for child, number in node.next_functions:
            if child is None:
                continue
            behind = starts.get((child, number)) or region_of(child) or region
            if behind != region:
                pairs.add((behind, region))
            if (behind, child) not in seen:
                seen.add((behind, child))
                todo.append((behind, child))
    return pairs, list(leaves.values())


def _step_nodes(regions: set[Region]) -> dict[Region, Node]:
    loops = sorted({region.run for region in regions}, key=lambda run: run.number)
    nodes: dict[Region, Node] = {}
    for region in regions:
        run, step = region
        loop = loops.index(run)
        ends = (0, run.steps - 1) if step is None else (step, step)
        name = _numbered(*ends, f" of loop {loop}" if len(loops) > 1 else "")
        nodes[region] = Node("step", name, loop, *ends, whole=step is None)
    return nodes


def _numbered(first: int, last: int, of_loop: str) -> str:
    return (f"step {first}" if first == last else f"steps {first}-{last}") + of_loop


def _adjacent(node: Node, after: Node) -> bool:
    steps = node.kind == after.kind == "step" and node.loop == after.loop
    return steps and node.last + 1 == after.first


def _boxes(nodes: Iterable[Node], alike: Callable[[Node, Node], bool]) -> dict[Node, Node]:
    """One box for neighbors that are alike, by node."""
    groups: list[list[Node]] = []
    for node in nodes:
        if groups and alike(groups[-1][-1], node):
            groups[-1].append(node)
        else:
            groups.append([node])
    return {node: _box(group[0], group[-1]) for group in groups for node in group}


def _box(first: Node, last: Node) -> Node:
    if first is last:
        return first
    of_loop = "".join(first.name.partition(" of ")[1:])
    return first._replace(name=_numbered(first.first, last.last, of_loop), last=last.last)


_MOST_STEPS = 20  # that are drawn one by one
_SHAPES = {"outer": "doubleoctagon", "step": "box", "input": "ellipse"}
_BOXES = {"outer": "round4", "step": "square", "input": "round"}
