"""What a run leaves to be looked at: trees of each step, and report.html to open them in a browser.

The report is one file, without network: the page engine/report.html, with the run in it as JSON.
What a policy or a wiki wrote stays data there: the page shows it as text and nothing else.
"""
import json
from pathlib import Path

from engine.draw import mark_of, read_metrics
from engine.files import read_lines, write_aside
from react_env import parse_action, split_completion
from tree import nodes, path

PAGE = Path(__file__).with_name("report.html")


def tree_rows(policy, roots, step):
    """A line of trees.jsonl: backed-up trees of a step as plain data."""
    return {"step": step, "trees": [tree_row(policy, root) for root in roots]}


def tree_row(policy, root):
    """The question of a tree, and its turns in the order of `nodes`."""
    turns, places = [], {}
    for node in nodes(root):
        places[node] = len(turns)
        turns.append(turn_row(policy, node, places.get(node.parent)))
    question = root.state.question
    return {"question": question.text, "answers": question.answers, "kind": question.kind,
            "hops": question.num_hops, "turns": turns}


def turn_row(policy, node, above):
    """One turn: `above` is the place of its parent, `started` how many rollouts began here (m at
    the root, k elsewhere), `logprob` that of all that was sampled."""
    row = {"value": rounded(node.value), "predicted": rounded(node.predicted),
           "leaves": node.num_leaves, "started": len(node.started)}
    if above is None:
        return row
    thought, action = split_completion(policy.wrote(node))
    kind, argument = parse_action(action)
    read = policy.text(node.ids[node.num_sampled:])
    return row | {"above": above, "mark": mark_of(node), "kind": kind, "argument": argument,
                  "thought": thought, "action": action, "read": read,
                  "continued": node.sample != path(node)[1].sample,
                  "logprob": rounded(node.logprobs.sum()), "sampled": node.num_sampled}


def rounded(number):
    return None if number is None else round(float(number), 3)


def read_trees(file):
    """The rows of trees.jsonl that are whole: what is damaged or missing is left out. Of two for
    one step the later one counts."""
    rows = {}
    if file.exists():
        for line in file.read_bytes().splitlines():
            try:
                row = json.loads(line, parse_constant=lambda name: None)  # NaN: JSON has none
                trees = [tree for tree in row["trees"] if tree["turns"][0]]
                rows[row["step"]] = {"step": row["step"], "trees": trees}
            except (ValueError, TypeError, LookupError, RecursionError):
                continue
    return list(rows.values())


def write_report(folder, command=""):
    """Write report.html of a run folder; -> its Path. `command` made the run."""
    folder = Path(folder)
    run = {"name": folder.resolve().name, "command": command, "metrics": read_metrics(folder),
           "evals": read_lines(folder / "evals.jsonl"),
           "trees": read_trees(folder / "trees.jsonl")}
    text = json.dumps(run).replace("<", "\\u003c")  # else an article could end the data
    with write_aside(folder / "report.html") as stream:
        stream.write(PAGE.read_text("utf-8").replace("THE_RUN", text).encode())
    return folder / "report.html"
