"""Which data-parallel ranks share a node: a packed reduction is flat, or has a level inside nodes and one between."""

import os
from typing import Any, NamedTuple

import torch


class Levels(NamedTuple):
    """The groups of a reduction over data-parallel ranks.

    Flat: ``inner`` is None, and ``outer`` is the group itself. On two levels ``inner`` has the ranks of this node, and
    ``outer`` the ranks of all nodes with this one's position in their node.
    """

    whole: Any
    inner: Any
    outer: Any

    @property
    def shards(self) -> list[int]:
        """The shard that each rank of ``outer`` owns."""
        if self.inner is None:
            return list(range(self.outer.size()))
        size = self.inner.size()
        return [node * size + self.inner.rank() for node in range(self.outer.size())]


def flat(group: Any) -> Levels:
    """One level."""
    return Levels(group, None, group)


def levels_of(group: Any) -> Levels:
    """Two levels if ``group`` has several nodes with equally many of its ranks, more than one each; otherwise flat.

    A node has the LOCAL_WORLD_SIZE ranks that torchrun started there. Flat where that differs, because then ranks are
    not numbered by node. Issues one gather of numbers, and makes two process groups, in which only their members take
    part.
    """
    per_node: list[int] = [1] * group.size()
    torch.distributed.all_gather_object(per_node, int(os.environ.get("LOCAL_WORLD_SIZE", "1")), group=group)
    nodes = ranks_by_node(torch.distributed.get_process_group_ranks(group), per_node[0])
    if len(nodes) == 1 or len(set(per_node)) > 1:
        return flat(group)
    here = torch.distributed.get_rank()
    (node,) = (node for node in nodes if here in node)
    column = [others[node.index(here)] for others in nodes]
    inner, outer = (torch.distributed.new_group(ranks, use_local_synchronization=True) for ranks in (node, column))
    return Levels(group, inner, outer)


def ranks_by_node(ranks: list[int], per_node: int) -> list[list[int]]:
    """``ranks`` of each node, or one list where they cannot be reduced on two levels."""
    nodes: dict[int, list[int]] = {}
    for rank in ranks:
        nodes.setdefault(rank // per_node, []).append(rank)
    found = list(nodes.values())
    in_order = [rank for node in found for rank in node] == ranks
    sizes = {len(node) for node in found}
    return found if in_order and len(sizes) == 1 and sizes != {1} else [ranks]
