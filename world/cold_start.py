"""A cold start: demonstrations for models that cannot play yet.

Where no rollout succeeds there is nothing to reinforce. So before step 1 the oracle shows how it
is done, on wikis that are never used again, and the adapter learns what it wrote, by the same
update as from rollouts. It learns the bare prompt: the examples in front of the question are not
needed afterwards. Nothing here is sampled.
"""
import itertools

from engine.errors import NotFinite, UsageError
from engine.files import write_json
from engine.processes import team
from engine.tell import progress_bar, say
from rollout import Rollout, end_turn
from tree import nodes
from world.questions import MAX_TURNS
from world.oracle import oracle, practice, run_agent

FIRST_WIKI = 2_000_000  # their seeds; those of the warm start begin at 1,000,000
PER_UPDATE = 4          # demonstrations
PEAK_RATE = 2e-3        # learning rate, from which it falls to 0


def demonstration(policy, env, question):
    """The oracle's episode as a tree of one path; -> its root."""
    root = policy.root(question, env)
    rollout = Rollout(root, root, 0, 0)
    for text, state in run_agent(env, question, oracle(question)):
        if not rollout.node.is_leaf:  # there is room
            rollout.ids = policy.encode(text)
            end_turn(policy, rollout, text, state)
    return root


def cold_start(policy, num, seed, folder, stopped=()):
    """Teach `num` demonstrations, each once, and write FOLDER/cold_start.json: the tokens that were
    taught and the loss, minus their mean log-prob, of each update. Where there is something in
    `stopped` the run ends; it cannot go on."""
    stream = itertools.islice(practice(FIRST_WIKI + 1000 * seed, MAX_TURNS), num)
    tokens, losses = 0, []
    for first in progress_bar(range(0, num, PER_UPDATE), "cold start", leave=False):
        if team().any(stopped):
            raise UsageError(f"{folder}: stopped in the cold start; nothing was saved")
        credits = []
        for env, question in itertools.islice(stream, PER_UPDATE):
            root = demonstration(policy, env, question)
            credits.append(dict.fromkeys(nodes(root)[1:], 1.0))
        result = policy.update(credits, PEAK_RATE * (1 - first / num))
        if result["update_skipped"]:
            raise NotFinite(f"{folder}: in the cold start a loss or gradient was not finite")
        tokens += result["loss_tokens"]
        losses.append(result["loss"])
    policy.start_optimizer()  # the training starts with a fresh one
    write_json(folder / "cold_start.json", {"demonstrations": num, "tokens": tokens,
                                            "losses": losses})
    say(f"cold start: {num:,} demonstrations of {tokens / num:.0f} tokens; loss of an update "
        f"{losses[0]:.2f} -> {losses[-1]:.2f}")
