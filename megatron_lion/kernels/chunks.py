"""Groups the tensors of an update into chunks with a bounded number of elements, cutting tensors that are larger."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from megatron_lion.precision import BLOCK, BlockLayout
from megatron_lion.step import StepTensors


class Piece(NamedTuple):
    """One parameter's tensors, or the same flat slice of each. None where a role is absent."""

    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    model_copy: Tensor | None
    remainder: Tensor | None
    scale: Tensor | None
    digits: Tensor | None = None
    layout: BlockLayout | None = None


class Chunk(NamedTuple):
    """Lists of tensors, one per role; together they have one block layout."""

    masters: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    model_copies: list[Tensor] | None
    remainders: list[Tensor] | None
    scales: list[Tensor] | None
    digits: list[Tensor] | None
    layout: BlockLayout | None


def chunks_of(tensors: StepTensors, limit: int) -> Iterator[Chunk]:
    """Every element of ``tensors`` once, in chunks of at most ``limit`` elements (with int8 momentum at least 32).

    Contiguous tensors that are larger are cut, with int8 momentum where a block begins. A larger tensor that is not
    contiguous is a chunk by itself. Tensors share a chunk only if the blocks of one do not depend on the others.
    """
    by_layout: defaultdict[BlockLayout | None, list[Piece]] = defaultdict(list)
    alone: list[list[Piece]] = []
    for index, (*roles, layout) in enumerate(tensors.entries()):
        whole = Piece(*roles)
        if tensors.scales is not None:
            whole = whole._replace(layout=layout)
        if tensors.digits is not None:
            whole = whole._replace(digits=tensors.digits[index])
        for piece in _pieces(whole, limit):
            if piece.layout is None:
                by_layout[None].append(piece)
            elif (shared := _shared_layout(piece.layout, piece.master.numel())) is not None:
                by_layout[shared].append(piece)
            else:
                alone.append([piece])
    for layout, pieces in by_layout.items():
        for group in _bounded(pieces, limit):
            yield _chunk(group, layout)
    for group in alone:
        yield _chunk(group, group[0].layout)


def _shared_layout(layout: BlockLayout, numel: int) -> BlockLayout | None:
    """The layout of this piece and of all others with the same result, one after another. None if there is none."""
    start, row_length = layout
    if row_length % BLOCK == 0 and not layout.splits_a_block(numel):
        return BlockLayout(0, BLOCK)
    return BlockLayout(0, row_length) if start % row_length == 0 and numel % row_length == 0 else None


def _pieces(whole: Piece, limit: int) -> Iterator[Piece]:
    """``whole`` in flat pieces of at most ``limit`` elements if it is contiguous; nothing if it is empty."""
    numel = whole.master.numel()
    *tensors, layout = whole
    limit = limit if layout is None else max(limit, BLOCK)
    if numel <= limit or not all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        if numel:
            yield whole
        return
    start = 0
    while start < numel:
        stop = min(start + limit, numel)
        if layout is not None and stop < numel:
            stop = start + _whole_blocks(BlockLayout(layout.start + start, layout.row_length), limit)
        yield _slice(whole, start, stop)
        start = stop


def _slice(whole: Piece, start: int, stop: int) -> Piece:
    """Elements ``start`` to ``stop`` of contiguous tensors, flat."""
    roles = {
        name: tensor.view(-1)[start:stop]
        for name, tensor in whole._asdict().items()
        if name not in ("scale", "layout") and tensor is not None
    }
    piece = whole._replace(**roles)
    if whole.layout is None or whole.scale is None:
        return piece
    scale = whole.scale[whole.layout.count(start) : whole.layout.count(stop)]
    return piece._replace(scale=scale, layout=BlockLayout(whole.layout.start + start, whole.layout.row_length))


def _whole_blocks(layout: BlockLayout, limit: int) -> int:
    """Length of the longest piece of at most ``limit`` elements that ends with a row, or, in longer rows, a block."""
    in_row = (layout.start + limit) % layout.row_length
    return limit - (in_row if layout.row_length <= limit else in_row % BLOCK)


def _bounded(pieces: list[Piece], limit: int) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    numel = 0
    for piece in pieces:
        if group and numel + piece.master.numel() > limit:
            yield group
            group, numel = [], 0
        group.append(piece)
        numel += piece.master.numel()
    yield group


def _chunk(pieces: list[Piece], layout: BlockLayout | None) -> Chunk:
    columns = zip(*(piece[:-1] for piece in pieces), strict=True)
    roles: list[Any] = [None if column[0] is None else list(column) for column in columns]
    return Chunk._make([*roles, layout])
