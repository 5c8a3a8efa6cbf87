"""What several processes would share, where there is one (engine/processes.py)."""
from tree import path


class Alone:
    """The only process of a run."""
    rank, count = 0, 1
    seconds = 0.0  # spent in telling each other things, and in waiting for the others

    def deal(self, anchors, counts):
        """Decide who grows each tree that nobody has yet, by the rollouts that it is to get.
        -> roots of the anchors' trees, each once, in order"""
        return list(dict.fromkeys(path(anchor)[0] for anchor in anchors))

    def owns(self, node):
        """Is this node's tree grown and trained here?"""
        return True

    def own(self, rollouts):
        """Those that are played here."""
        return [rollout for rollout in rollouts if self.owns(rollout.anchor)]

    def part(self, items):
        """Every count-th item, of a list that is shared out evenly."""
        return items[self.rank::self.count]

    def exchange(self, roots, rollouts):
        """Tell all what has grown below the roots dealt to each, without its caches. All rollouts
        stand at their ends then."""

    def exchange_states(self, roots):
        """Tell all the hidden states of these roots: each process has fed its part."""

    def any(self, value):
        """Is it true in at least one process?"""
        return bool(value)

    def first(self, work):
        """work() in the first process; what comes of it, or its error, is told to all."""
        return work()

    def part_ways(self):
        """At the end of a run: nobody leaves while another still works."""

    def add_up(self, weights, number):
        """-> the sum over processes of a number, and, in place, that of the gradients."""
        return number
