"""The worked example of notebooks and tests: one question, one tree, numbers to check by hand.

    root .4 ─┬─ a1 .4 ─┬─ a2 .9 ── a3 ✓           bare rollout, sample 0
             │         ├─ c1 ── c2 ✓              continuation of a1
             │         └─ d1 ✗                    continuation of a1: stops a hop early
             └─ b1 .4 ─┬─ b2 .1 ── b3 ✗           bare rollout: takes the translator
                       ├─ e1 ── e2 ✗              continuation of b1: the same again
                       └─ f1 ── f2 ── f3 ✓        continuation of b1: looks twice

The numbers are Ṽ, made up here; a1 and b1 are word for word the same turn. V̂: root 1/2,
a1 2/3, b1 1/3. The embedded tiny policy really answers this question in these ways.
"""
import numpy as np

from react_env import Question, ReActEnv, Wiki, observation_text, prompt_text
from tree import Node, backup
from world.toy import turn

QUESTION = Question("example", "What is the birth year of the author of The Silent Bridge?",
                    ("1834",), "bridge", 2, ("The Silent Bridge", "Ada Velkan"), "toy")
ENV = ReActEnv(Wiki([
    ("The Silent Bridge", ("The Silent Bridge is a novel.",
                           "The translator of the novel is Hugo Marfen.",
                           "The author of the novel is Ada Velkan.",
                           "The Silent Bridge appeared in 1871.")),
    ("Ada Velkan", ("Ada Velkan is a painter.", "The painter married Tom Kelval.",
                    "The birth year of the painter is 1834.")),
    ("Hugo Marfen", ("Hugo Marfen is a poet.", "The poet married Nora Dorlem.",
                     "The birth year of the poet is 1849."))]), max_turns=8)

BOOK = turn("I look for The Silent Bridge.", "Search", "The Silent Bridge")
AGAIN = turn("The author is not shown.", "Lookup", "author")
AUTHOR = turn("The author is Ada Velkan.", "Search", "Ada Velkan")
TRANSLATOR = turn("The author is Hugo Marfen.", "Search", "Hugo Marfen")
EARLY = turn("The author is Ada Velkan.", "Finish", "Ada Velkan")
RIGHT, WRONG = (turn(f"The birth year is {year}.", "Finish", year) for year in ("1834", "1849"))


def example_tree(encode=str.encode, expanded=True):
    """The tree above, backed up; only its two bare rollouts where it is not `expanded`.
    `encode` makes ids of text: a policy's, or bytes of UTF-8."""
    root = Node(np.array(list(encode(prompt_text(QUESTION))), np.int32), 0, ENV.reset(QUESTION))
    root.predicted = 0.4
    for sample, (texts, guess) in enumerate((((BOOK, AUTHOR, RIGHT), 0.9),
                                             ((BOOK, TRANSLATOR, WRONG), 0.1))):
        first, second, _ = _play(root, texts, encode, sample)
        first.predicted, second.predicted = 0.4, guess
    a1, b1 = root.children
    if expanded:
        for sample, (prefix, texts) in enumerate((
                (a1, (AUTHOR, RIGHT)), (a1, (EARLY,)), (b1, (TRANSLATOR, WRONG)),
                (b1, (AGAIN, AUTHOR, RIGHT))), start=2):
            _play(prefix, texts, encode, sample)
    backup(root)
    return root


def _play(node, texts, encode, sample):
    """Play the turns below `node` -> their nodes."""
    played = []
    for text in texts:
        state = ENV.step(node.state, text.partition("Action: ")[2])
        own, seen = list(encode(text)), "" if state.done else observation_text(state.observation)
        node = Node(np.array(own + list(encode(seen)), np.int32), len(own), state, node,
                    sample=sample)
        played.append(node)
    return played


def wrote(node):
    """What was written in a turn whose ids are bytes."""
    return bytes(node.ids[:node.num_sampled].tolist()).decode()


def check(given, want):
    """Say how an exercise stands: None, also within a list, is not solved yet."""
    if np.any(np.equal(given, None)):
        print("not solved yet")
    else:
        right = np.shape(given) == np.shape(want) and np.allclose(given, want, 1e-4, 1e-6)
        print("solved" if right else f"not yet: got {given}")


if __name__ == "__main__":
    from pathlib import Path

    from engine.draw import draw_tree, tree_text
    print(tree_text(example_tree(), wrote))
    draw_tree(example_tree(), wrote, "Two bare rollouts, then four continuations").write(
        Path(__file__).parents[1] / "results" / "tree.png")
