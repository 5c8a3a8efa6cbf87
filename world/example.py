"""The worked example of notebooks and tests: one question, one tree, numbers to check by hand.

    root .4 ─┬─ a1 .4 ─┬─ a2 .9 ── a3 ✓           bare rollout, sample 0
             │         ├─ c1 ── c2 ✓              continuation of a1
             │         └─ d1 ✗                    continuation of a1: stops a hop early
             └─ b1 .4 ─┬─ b2 .1 ── b3 ✗           bare rollout: takes the translator
                       ├─ e1 ── e2 ✗              continuation of b1: the same again
                       └─ f1 ── f2 ── f3 ✓        continuation of b1: looks twice

The numbers are Ṽ, made up here. a1 and b1 are word for word the same turn. V̂: root 1/2, a1 2/3,
b1 1/3. The embedded tiny policy really answers this question in these ways.
`python -m world.example` prints the tree, and draws it and the cycle for the README.
"""
from pathlib import Path

import numpy as np

from engine.draw import draw_cycle, draw_tree, tree_text
from react_env import Question, ReActEnv, Wiki, observation_text, prompt_text
from tree import Node, backup

RESULTS = Path(__file__).parents[1] / "results"
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

# Turns, as they stand after "Thought:"
BOOK = " I look for The Silent Bridge.\nAction: Search[The Silent Bridge]"
AGAIN = " The author is not shown.\nAction: Lookup[author]"
AUTHOR = " The author is Ada Velkan.\nAction: Search[Ada Velkan]"
TRANSLATOR = " The author is Hugo Marfen.\nAction: Search[Hugo Marfen]"
EARLY = " The author is Ada Velkan.\nAction: Finish[Ada Velkan]"
RIGHT = " The birth year is 1834.\nAction: Finish[1834]"
WRONG = " The birth year is 1849.\nAction: Finish[1849]"


def example_tree(encode=str.encode, expanded=True):
    """The tree above, backed up; only its two bare rollouts where it is not `expanded`.
    `encode` makes ids of text: a policy's, or bytes of UTF-8."""
    root = Node(np.array([*encode(prompt_text(QUESTION))], np.int32), 0, ENV.reset(QUESTION))
    a1, a2, _ = play(encode, root, 0, BOOK, AUTHOR, RIGHT)
    b1, b2, _ = play(encode, root, 1, BOOK, TRANSLATOR, WRONG)
    root.predicted = a1.predicted = b1.predicted = 0.4
    a2.predicted = 0.9
    b2.predicted = 0.1
    if expanded:
        play(encode, a1, 2, AUTHOR, RIGHT)
        play(encode, a1, 3, EARLY)
        play(encode, b1, 4, TRANSLATOR, WRONG)
        play(encode, b1, 5, AGAIN, AUTHOR, RIGHT)
    backup(root)
    return root


def play(encode, node, sample, *texts):
    """Play these turns below `node`; -> their nodes."""
    played = []
    for text in texts:
        state = ENV.step(node.state, text.partition("Action: ")[2])
        seen = "" if state.done else observation_text(state.observation)
        written = encode(text)
        ids = np.array([*written, *encode(seen)], np.int32)
        node = Node(ids, len(written), state, node, sample=sample)
        played.append(node)
    return played


def wrote(node):
    """What was written in a turn whose ids are bytes."""
    return bytes([*node.ids[:node.num_sampled]]).decode()


if __name__ == "__main__":
    print(tree_text(example_tree(), wrote))
    draw_tree(example_tree(), wrote, "Two bare rollouts, then four continuations",
              "predicted").write(RESULTS / "tree.png")
    draw_cycle(2, 4).write(RESULTS / "cycle.png")
    draw_cycle(2, 4, height=3.6).write(RESULTS / "cycle-slide.png", dpi=300)  # 1920 x 1080
