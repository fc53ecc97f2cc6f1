"""What tests of a model's rows have shown, kept for its next batches that run the same operations.

A training loop scores batch after batch, a call each. Whose a row is, and that a layer's calls are
all that its weight does, follows from which operations ran on which shapes: from the graph behind
the logits. So a graph that has passed its tests several times is believed, whatever changes the
model in between; another graph is tested anew. Only operations that treat samples by their place
count: where rows are picked or mixed by numbers (an index, a product with the data on its right, a
function of the user's own), every batch is tested.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from imu_fast.model.calls import Call

_ELEMENTWISE = (
    "Abs|Add|Alias|Clamp|ClampMin|ClampMax|Clone|Cos|Div|Elu|Erf|Exp|Gelu|Hardswish|Hardtanh"
    "|LeakyRelu|LogSigmoid|MaskedFill|Mul|NativeDropout|Neg|Pow|Prelu|Reciprocal|Relu|Rsqrt|Rsub|Sigmoid|Silu"
    "|Sin|Softplus|Sqrt|Sub|Tanh|Threshold|ToCopy|Where"
)
# By sizes and numbers that are written down in the node.
_BY_PLACE = (
    "AsStrided|Cat|Expand|Permute|ReshapeAlias|Select|Slice|Split|SplitWithSizes|Squeeze|Stack|T"
    "|Transpose|Unbind|UnsafeSplit|UnsafeView|Unsqueeze|View"
)
_ALONG_AXES = "LogSoftmax|Mean|NativeLayerNorm|FusedRmsNorm|Softmax|Sum|Var|Amax"
_PRODUCTS = "Addmm|Mm"
_BATCHED = (
    "Bmm|Baddbmm|ScaledDotProductFlashAttention|ScaledDotProductFlashAttentionForCpu"
    "|ScaledDotProductEfficientAttention|ScaledDotProductCudnnAttention"
)
_KNOWN = re.compile(
    rf"({_ELEMENTWISE}|{_BY_PLACE}|{_ALONG_AXES}|{_PRODUCTS}|{_BATCHED})Backward\d+"
)
_PLACED = re.compile(rf"({_BY_PLACE}|{_ALONG_AXES}|{_BATCHED})Backward\d+")
_PRODUCT = re.compile(rf"({_PRODUCTS})Backward\d+")
_BATCH = re.compile(rf"({_BATCHED})Backward\d+")
_LEAF = "torch::autograd::AccumulateGrad"

# Tests that a graph must have passed, rows of samples that it must have shown by then (in bits, see
# rows.py), and how many uses later it is tested again.
_TESTS, _BITS, _EVERY = 4, 40.0, 16
_KEPT = 64  # graphs of a model


@dataclass
class Proof:
    """What the tests of one graph have shown.

    Attributes:
        owners: of each call's rows, as of the first test. tests, bits: passed so far.
        whole: whether the calls were all of their weights' gradients.
        broken: two tests disagreed, or there was one that no layout passed.
    """

    owners: list[Tensor] | None = None
    tests: int = 0
    bits: float = 0.0
    whole: bool = False
    broken: bool = False
    _uses: int = 0

    def holds(self) -> bool:
        """Whether the next batch needs no test; to be asked once per batch."""
        sure = self.tests >= _TESTS and self.bits >= _BITS
        if self.owners is None or self.broken or not self.whole or not sure:
            return False
        self._uses += 1
        return self._uses % _EVERY != 0

    def passed(self, owners: Sequence[Tensor], bits: float, regular: bool) -> None:
        """A test of all calls, the fewest bits that one of them has shown, and whether by rule."""
        first = self.owners is None
        self.owners = list(owners) if first else self.owners
        assert self.owners is not None
        same = first or all(map(torch.equal, self.owners, owners))
        self.broken |= not (regular and same)
        self.tests, self.bits = self.tests + 1, self.bits + bits


_proofs: WeakKeyDictionary[nn.Module, dict[Hashable, Proof]] = WeakKeyDictionary()


def proof_of(model: nn.Module, logits: Tensor, calls: Sequence[Call], n: int) -> Proof | None:
    """The proof of the graph between these calls and the logits; None: it cannot have one.

    Args:
        calls: each with a leaf. n: samples of the batch.
    """
    graph = _graph(logits, calls, n)
    if graph is None:
        return None
    kept = _proofs.setdefault(model, {})
    proof = kept.pop(graph, None) or Proof()
    kept[graph] = proof  # the last one that was used is the last to go
    if len(kept) > _KEPT:
        del kept[next(iter(kept))]
    return proof


def _graph(logits: Tensor, calls: Sequence[Call], n: int) -> Hashable | None:
    """Operations, what they are connected to, shapes and saved numbers, in a fixed order."""
    if logits.grad_fn is None:
        return None
    places: dict[Any, int] = {logits.grad_fn: 0}
    nodes: list[Any] = [logits.grad_fn]
    said: list[Hashable] = [n, tuple(logits.shape), logits.dtype]
    doubtful: list[Any] = []
    ends: set[Any] = set()
    for node in nodes:  # which grows
        name = node.name()
        edges = []
        for following, number in node.next_functions:
            if following is not None and following not in places:
                places[following] = len(nodes)
                nodes.append(following)
            edges.append(-1 if following is None else (places[following], number))
        if name == _LEAF:
            said.append((name, tuple(node.variable.shape)))
            continue
        kind = _kind(name)
        shapes = tuple(tuple(m.shape) for m in node._input_metadata)
        if kind != "plain" and (kind == "unknown" or not _keeps_samples(kind, node, shapes, n)):
            doubtful.append(node)
        said.append((name, tuple(edges), shapes, *_numbers(node, name)))
    for call in calls:
        leaf = call.target
        node = leaf.grad_fn
        if node is None:
            found = [p for x, p in places.items() if x.name() == _LEAF and x.variable is leaf]
        else:
            found = [places[node]] if node in places else []
        said.append((call.layer.name, tuple(leaf.shape), leaf.output_nr, *found))
        ends |= {nodes[place] for place in found}
    return None if doubtful and _lead(doubtful, ends) else tuple(said)


def _lead(nodes: Sequence[Any], ends: set[Any]) -> bool:
    """Whether a gradient comes through one of these nodes to one of the ends."""
    seen = set(nodes)
    stack = list(nodes)
    while stack:
        for following, _ in stack.pop().next_functions:
            if following in ends:
                return True
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return False


@functools.cache
def _kind(name: str) -> str:
    """Of an operation: unknown, product, batched, repeating, or plain."""
    if name.startswith(("Mul", "Expand")):
        return "repeating" if _KNOWN.fullmatch(name) else "unknown"
    if _KNOWN.fullmatch(name) is None:
        return "unknown"
    if _PRODUCT.fullmatch(name):
        return "product"
    return "batched" if _BATCH.fullmatch(name) else "plain"


def _keeps_samples(kind: str, node: Any, shapes: Sequence[Sequence[int]], n: int) -> bool:
    """Whether a product multiplies the data's rows by a weight, or sample by sample; and nothing
    is repeated for every sample, to be picked from by numbers."""
    if kind == "repeating":
        return not any(_repeats(edge, shapes[0], n) for edge in node.next_functions)
    if kind == "batched":
        return all(not shape or shape[0] % n == 0 for shape in shapes[:1])
    *_, right = node.next_functions[-2:]
    return _is_weight(right[0])


def _repeats(edge: tuple[Any, int], shape: Sequence[int], n: int) -> bool:
    """Whether an operand is repeated along an axis, not the last, that may be of samples."""
    node, number = edge
    if node is None or node.name() == _LEAF:
        return False
    own = tuple(node._input_metadata[number].shape)
    own = (1,) * (len(shape) - len(own)) + own
    pairs = list(zip(own, shape, strict=True))[:-1]
    return any(one == 1 != many and many % n == 0 for one, many in pairs)


def _is_weight(node: Any) -> bool:
    """Whether nothing but a leaf, maybe transposed, is behind a node."""
    while node is not None and node.name() != _LEAF:
        if node.name() not in ("TBackward0", "TransposeBackward0"):
            return False
        node = node.next_functions[0][0]
    return True


_saved_of: dict[str, tuple[str, ...]] = {}


def _saved(name: str, node: Any) -> tuple[str, ...]:
    """Saved attributes of a kind of node that say where things go."""
    if name not in _saved_of:
        words = "dim start end step index size stride offset normalized_shape".split()
        every = [a for a in dir(node) if a.startswith("_saved_") and _PLACED.fullmatch(name)]
        _saved_of[name] = tuple(a for a in every if any(word in a for word in words))
    return _saved_of[name]


def _numbers(node: Any, name: str) -> list[Hashable]:
    found: list[Hashable] = []
    for attribute in _saved(name, node):
        value = getattr(node, attribute)
        found.append(tuple(map(str, value)) if isinstance(value, list | tuple) else str(value))
    return found


_PICKS = re.compile(
    r"(Index|IndexSelect|IndexPut|IndexAdd|IndexCopy|Gather|Scatter|ScatterAdd|ScatterReduce|Sort"
    r"|Topk|MaskedSelect|MaskedScatter|Take|TakeAlongDim)Backward\d+"
)


def moves_samples(logits: Tensor, calls: Sequence[Call]) -> bool:
    """Whether rows come between these calls and the logits to other places by numbers of the data.

    A model that sorts its batch, or sends samples to experts, may do so in any batch: what tests of
    others have shown of its layout says nothing of this one's.
    """
    if logits.grad_fn is None:
        return False
    seen: set[Any] = {logits.grad_fn}
    nodes: list[Any] = [logits.grad_fn]
    for node in nodes:  # which grows
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    picking = [node for node in nodes if _PICKS.fullmatch(node.name()) and _along_samples(node)]
    if not picking:
        return False
    inner = {call.target.grad_fn for call in calls} - {None}
    leaves = {id(call.target) for call in calls if call.target.grad_fn is None}
    inner |= {x for x in nodes if x.name() == _LEAF and id(x.variable) in leaves}
    return _lead(picking, inner)


def _along_samples(node: Any) -> bool:
    """Whether an operation picks along the first axis, and not every place in order."""
    indices = getattr(node, "_saved_indices", None)
    if indices is not None:
        first = indices[0]
        if first is None:
            return False
        places = torch.arange(len(first), device=first.device) if first.dim() == 1 else None
        return places is None or not torch.equal(first, places)
    return getattr(node, "_saved_dim", 0) == 0
