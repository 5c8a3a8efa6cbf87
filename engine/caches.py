"""Which trees hold on to which caches: a node's `cache` is (RaggedCache, row), or None."""
from engine.sampling import RaggedCache
from tree import nodes


def fork(standing):
    """A cache with a copy of the path of each of these nodes, a row for each."""
    return RaggedCache.fork([node.cache for node in standing],
                            [node.length for node in standing])


def move(standing):
    """fork, after which all nodes that lay in those rows refer to the new ones: no copy of a path
    outlives its use. -> the cache, None where there are no nodes"""
    if not standing:
        return None
    moved = fork(standing)
    for row, node in enumerate(standing):
        old = node.cache[0]
        while node is not None and node.cache and node.cache[0] is old:
            node.cache = moved, row
            node = node.parent
    return moved


def held_tokens(roots):
    """Cache columns that the trees of these roots hold on to."""
    caches = set()
    for root in roots:
        caches.update(node.cache[0] for node in nodes(root) if node.cache)
    return sum(cache.num_columns() for cache in caches)


def forget_caches(roots):
    """Free the caches of trees from which nothing grows soon. A tree is a cycle of references:
    left to Python's garbage collection, its caches would outlive it for long."""
    for root in roots:
        for node in nodes(root):
            node.cache = None


def forget_paths(rollouts):
    """Free the caches of what these rollouts have added to their trees."""
    for rollout in rollouts:
        node = rollout.node
        while node is not rollout.anchor:
            node.cache = None
            node = node.parent
