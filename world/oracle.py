"""An agent that answers the questions of the toy Wikipedia by reading, and never by knowing.

It knows the plan of a question and the wordings of relations, and reads every value from
observations. With slips it makes the flawed demonstrations of world/warm_start.py.
`python -m world.oracle` prints a few questions and how it answers them;
`python -m world.oracle --num 10000` says how many it can answer.
"""
import itertools
import re
import sys

from engine.command_line import Parser, run_main
from react_env import ReActEnv
from world.toy import bare, is_namesake, make_questions, make_world
from world.words import RELATION, RELATIONS, TYPE_OF


def read_value(relation, subject, observation):
    """The value of a relation as an observation tells it, or None. `subject` is the title of
    the page. Knows the wordings, as any reader does, and nothing of the world."""
    who = f"(?:[Tt]he (?:{'|'.join(TYPE_OF)})|{re.escape(bare(subject))})"
    text = re.sub(r"^\(Result \d+ / \d+\) ", "", observation)
    for sentence in re.split(r"(?<=\.) ", text):
        for wording in RELATION[relation].sentences:
            pattern = wording.replace(".", r"\.").format(s=who, o="(.+?)")
            match = re.fullmatch(pattern, sentence)
            if match:
                return match[1]
    return None


def turn(thought, kind, argument):
    """The text of one turn, as it stands after "Thought:"."""
    return f" {thought}\nAction: {kind}[{argument}]"


def never(fault, relation=None):
    """The oracle's slips: none."""
    return False


def oracle(question, slip=never):
    """Generator: yields the text of a turn, is sent the observation. It knows the plan of the
    question and reads every value from observations. `slip(fault, relation) -> bool` decides
    where it goes wrong: warm_start.py makes flawed demonstrations of it."""
    thought = f"I look for {bare(question.starts[0])}."
    values = []
    for start in question.starts:
        value = yield from _walk(question, start, thought, slip)
        if value is None:
            yield turn("I do not know.", "Finish", "unknown")
            return
        thought = f"The {question.relations[-1]} is {value}."
        values.append(value)
        hasty = "assume_yes" if question.goal == "same" else "one_side"
        if question.goal != "value" and slip(hasty):
            break
    answer = value
    if question.goal == "same":
        answer = "yes" if len(set(values)) == 1 else "no"
    elif question.goal != "value":
        best = min(values) if question.goal == "earlier" else max(values)
        answer = question.starts[values.index(best)]
    yield turn(thought, "Finish", answer)


def _walk(question, start, thought, slip):
    """Follow the relations from `start`; returns the last value, None where it is lost."""
    page = bare(start)
    observation = yield turn(thought, "Search", page)
    if is_namesake(start):
        page, observation = yield from _choose(start, observation, slip)
        if page is None:
            return None
    for hop, name in enumerate(question.relations, 1):
        value = read_value(name, page, observation)
        neighbour = RELATION[name].neighbour
        other = read_value(neighbour, page, observation) if neighbour else None
        if other and slip("confuse", relation=name):
            value = other
        elif value is None and slip("no_lookup"):  # whatever is of the same type
            for relation in RELATIONS:
                if value is None and relation.target == RELATION[name].target:
                    value = read_value(relation.name, page, observation)
        while value is None:
            if observation.startswith(("No more", "Could not")):
                return None
            observation = yield turn(f"The {name} is not shown.", "Lookup", RELATION[name].keyword)
            value = read_value(name, page, observation)
        if hop == len(question.relations) or hop >= 2 and slip("early_stop"):
            return value
        page = value
        observation = yield turn(f"The {name} is {value}.", "Search", value)


def _choose(start, observation, slip):
    """Pick the title that is meant from a page of namesakes or a list of similar titles.
    Returns (page, observation), page None where it gives up."""
    if observation.startswith("Could not") and slip("give_up"):
        return None, observation
    page = start
    if slip("first_choice"):
        page = re.search(rf"{bare(start)} \(\w+\)", observation)[0]
    observation = yield turn(f"I choose {page}.", "Search", page)
    if page != start and not slip("no_check"):
        page = start
        observation = yield turn("This is the wrong page.", "Search", page)
    return page, observation


def practice(first_seed, max_turns, **options):
    """Endless (environment, question) on small wikis with seeds from `first_seed` on: what is
    demonstrated. The options are those of make_questions."""
    for seed in itertools.count(first_seed):
        world = make_world(200, seed)
        env = ReActEnv(world.wiki, max_turns)
        for question in make_questions(world, 100, **options):
            yield env, question


def run_agent(env, question, agent):
    """Play one episode -> [(text, Episode after it) of every turn]."""
    episode, text = env.reset(question), next(agent)
    turns = []
    while True:
        episode = env.step(episode, text.partition("Action: ")[2])
        turns.append((text, episode))
        if episode.done:
            return turns
        text = agent.send(episode.observation)


def main():
    parser = Parser(__doc__, prog="world.oracle")
    parser.add_argument("--articles", type=int, default=1000, help="articles in the wiki")
    parser.add_argument("--seed", type=int, default=0, help="seed of the wiki")
    parser.add_argument("--num", type=int, help="answer so many questions, print none")
    options = parser.parse_args()
    world = make_world(options.articles, options.seed)
    env = ReActEnv(world.wiki)
    questions = make_questions(world, options.num or 8)
    num_solved = 0
    for question in questions:
        turns = run_agent(env, question, oracle(question))
        num_solved += turns[-1][1].reward
        if not options.num:
            print(f"\nQuestion ({question.kind}, {question.num_hops} hops): {question.text}")
            for text, episode in turns:
                print(f"Thought:{text}\nObservation: {episode.observation}")
    print(f"oracle: {num_solved:.0f} of {len(questions)} solved")


if __name__ == "__main__":
    sys.exit(run_main("world.oracle", main))
