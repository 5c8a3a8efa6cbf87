"""A fictional Wikipedia made from a seed, its questions, and an oracle that answers them.

    from world.toy import make_world, make_questions
    world = make_world(num_articles=1000, seed=0)            # any size, 100 to 100,000
    questions = make_questions(world, 500, seed=1, split="train")

People, towns, countries, institutions, works and events have articles that link to each
other. No model can know them by heart: every name is put together from syllables. What
makes the world worth learning in:

- every relation has several wordings, and most have a *neighbour* that a hasty reader
  confuses with it (mayor and judge, birthplace and deathplace);
- a long article tells some of its facts only after the fifth sentence, which `Search`
  does not show: they need `Lookup`, and an "earlier mayor" may answer the first one;
- namesakes share a bare name: `Search[Belkan]` meets a disambiguation page, or finds
  nothing and answers with similar titles, of which one is meant.

Questions are plans over functional relations, so every answer is unique by construction.
`python -m world.toy --oracle 10000` lets the oracle, who reads values from observations
only, answer them; `python -m world.toy` prints a few articles and questions.
"""
import argparse
import hashlib
import random
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from react_env import Question, ReActEnv, Wiki
from world.words import (
    ADJECTIVES,
    BY_OWNER,
    FILLERS,
    GIVEN,
    LABELS,
    NOUNS,
    RELATION,
    RELATIONS,
    SHARES,
    SYLLABLES,
    YEAR_OF,
)

SHOWN_SENTENCES = 5  # what Search shows; a fact that stands later needs Lookup


class Fact(NamedTuple):
    value: str    # title of an article, or a plain word
    lookups: int  # how many Lookup calls it takes to read it; 0 where Search shows it


@dataclass(frozen=True)
class World:
    """A generated wiki with the facts behind it (the agent sees only `wiki`)."""
    wiki: Wiki
    facts: dict       # title -> {relation name: Fact}
    label: dict       # title -> what it is, in one word ("painter", "town")
    type_of: dict     # title -> entity type
    titles: dict      # entity type -> titles, in a fixed order
    namesakes: dict   # bare name -> titles that share it
    seed: int


def _name(rng, taken, ending=""):
    """A new name of two syllables, or more when the short ones run out."""
    for length in (2, 2, 2, 3, 3, 3, 4, 4, 4, 4):
        name = "".join(rng.choices(SYLLABLES, k=length)).capitalize() + ending
        if name not in taken:
            taken.add(name)
            return name
    raise ValueError("num_articles is too large: the names have run out")


def _title(rng, kind, label, taken):
    """A new title in the manner of its entity type."""
    while True:
        if kind == "person":
            title = f"{rng.choice(GIVEN)} {''.join(rng.choices(SYLLABLES, k=2)).capitalize()}"
        elif kind == "work":
            title = f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
            if title in taken:
                title += " of " + "".join(rng.choices(SYLLABLES, k=2)).capitalize()
        elif kind == "institution":
            return f"{_name(rng, taken)} {label.capitalize()}"
        elif kind == "event":
            return f"{label.capitalize()} of {_name(rng, taken)}"
        else:
            return _name(rng, taken, "ia" if kind == "country" else "")
        if title not in taken:
            taken.add(title)
            return title


def make_world(num_articles=1000, seed=0):
    """World of exactly `num_articles` articles (at least 100), the same for the same seed."""
    if num_articles < 100:
        raise ValueError(f"num_articles must be at least 100, got {num_articles}")
    rng = random.Random(f"world {seed}")
    counts = {kind: max(2, int(share * num_articles)) for kind, share in SHARES.items()}
    num_groups = (num_articles - sum(counts.values())) // 3
    label, type_of, titles, taken = {}, {}, {kind: [] for kind in SHARES}, set()

    def add(title, kind, word):
        label[title], type_of[title] = word, kind
        titles[kind].append(title)

    # namesakes: two or three articles with one bare name; half the groups have a page of their own
    namesakes, pages = {}, {}
    for group in range(num_groups):
        bare = _name(rng, taken)
        words = rng.sample(LABELS["person"], 2) + (["town"] if group % 2 else [])
        rng.shuffle(words)
        members = [f"{bare} ({word})" for word in words]
        for title, word in zip(members, words):
            add(title, "town" if word == "town" else "person", word)
        namesakes[bare] = tuple(members)
        if group % 2 == 0:
            pages[bare] = [f"{bare} may refer to {', '.join(members)}."]
    missing = num_articles - len(type_of) - len(pages)
    for kind in SHARES:
        want = counts[kind] if kind != "person" else missing - sum(counts.values()) + counts[kind]
        for _ in range(want):
            word = rng.choice(LABELS[kind])
            add(_title(rng, kind, word, taken), kind, word)

    facts = {}
    for title, kind in type_of.items():
        facts[title], pages[title] = _article(rng, title, kind, label[title], titles)
    order = list(pages)
    rng.shuffle(order)
    return World(Wiki((title, pages[title]) for title in order), facts, label, type_of, titles,
                 namesakes, seed)


def _article(rng, title, kind, word, titles):
    """-> ({relation: Fact}, [sentences]). Two in five articles are long."""
    relations = BY_OWNER[kind]
    is_long = rng.random() < 0.4
    chosen = rng.sample(relations, len(relations) if is_long else min(4, len(relations)))
    bare = title.split(" (")[0]
    facts, told = {}, []
    for relation in chosen:
        value = title
        while value == title:  # nobody is their own teacher
            value = (str(rng.randrange(1000, 2000)) if relation.target == "year" else
                     "".join(rng.choices(SYLLABLES, k=2)).capitalize()
                     if relation.target == "coin" else
                     rng.choice(titles[relation.target]))
        subject = f"the {word}" if rng.random() < 0.7 else bare
        told.append((relation, value, rng.choice(relation.sentences).format(
            S=subject[0].upper() + subject[1:], s=subject, o=value)))
    sentences = [s for _, _, s in told]
    if is_long:  # fillers and a false friend push facts behind the fifth sentence
        for filler in rng.sample(FILLERS, rng.randint(1, 2)):
            sentences.insert(rng.randrange(len(sentences)), filler)
        tail = rng.choice(told)[0]
        if tail.target == "person" and rng.random() < 0.5:
            others = [name for name in rng.sample(titles["person"], 2) if name != title]
            sentences.insert(rng.randrange(len(sentences)),
                             f"An earlier {tail.name} is {rng.choice(others)}.")
    sentences.insert(0, f"{bare} is {'an' if word[0] in 'aeiou' else 'a'} {word}.")
    for relation, value, sentence in told:
        place = sentences.index(sentence)
        facts[relation.name] = Fact(value, 0 if place < SHOWN_SENTENCES else 1 + sum(
            relation.keyword in earlier.lower() for earlier in sentences[:place]))
    return facts, sentences


@dataclass(frozen=True)
class ToyQuestion(Question):
    """A question with the plan behind it, for the oracle and the demonstrations only."""
    starts: tuple = ()     # titles where the plan begins: one, or two to be compared
    relations: tuple = ()  # relation names, first hop first
    goal: str = "value"    # value | earlier | later | same
    traps: tuple = ()      # where a hasty reader can go wrong, to report success by fault


def _mention(world, title):
    """How a question names an article: a namesake goes by "the painter Belkan"."""
    bare = title.split(" (")[0]
    return f"the {world.label[title]} {bare}" if bare in world.namesakes else title


def _in_split(title, split):
    """A title belongs to one split for good: a quarter of the starts is for evaluation."""
    held_out = hashlib.blake2b(title.encode(), digest_size=2).digest()[0] < 64
    return split is None or held_out == (split == "eval")


def _question(world, kind, starts, relations, goal, text, answer, path, traps):
    key = repr((starts, relations, goal)).encode()
    return ToyQuestion(
        id=f"toy{world.seed}-{hashlib.blake2b(key, digest_size=6).hexdigest()}", text=text,
        answers=(answer,), kind=kind, num_hops=len(relations) * len(starts),
        gold_titles=tuple(dict.fromkeys(path)), rules="toy", starts=starts,
        relations=relations, goal=goal, traps=tuple(sorted(traps)) or ("none",))


HOP_WEIGHTS = (0.36, 0.32, 0.22, 0.1, 0.1, 0.1)  # of chains with 1 to 6 hops


def _chain(world, rng, start, max_hops):
    """A bridge chain from `start`, or None where it ends early, circles or takes too long."""
    num_hops = rng.choices(range(1, max_hops + 1), HOP_WEIGHTS[:max_hops])[0]
    title, relations, path, lookups, traps = start, [], [], 0, set()
    for hop in range(num_hops):
        if title not in world.facts or title in path:
            return None
        path.append(title)
        name = rng.choice(list(world.facts[title]))
        relations.append(name)
        neighbour = world.facts[title].get(RELATION[name].neighbour)
        title, more = world.facts[title][name]
        lookups += more
        traps |= {"hidden fact"} if more else set()
        traps |= {"neighbour"} if neighbour and not neighbour.lookups else set()
    is_namesake = start.split(" (")[0] in world.namesakes
    if num_hops + 1 + lookups + is_namesake > 7:
        return None
    traps |= {"namesake"} if is_namesake else set()
    traps |= {"long chain"} if num_hops > 2 else set()
    phrase = _mention(world, start)
    for name in relations:
        phrase = rng.choice(RELATION[name].nouns).format(x=phrase)
    word = "Who" if RELATION[relations[-1]].target == "person" else "What"
    kind = "similar" if is_namesake else "lookup" if lookups else "bridge"
    return _question(world, kind, (start,), tuple(relations), "value",
                     f"{word} is {phrase}?", title, path, traps)


def _pair(world, rng, start, kind, split):
    """A comparison of years, or a yes/no question whether two articles share a value."""
    owner = world.type_of[start]
    if kind == "comparison":
        names = [YEAR_OF[owner].name] if owner in YEAR_OF else []
    else:
        names = [r.name for r in BY_OWNER[owner] if r.target in world.titles]
    names = [n for n in names if n in world.facts[start] and world.facts[start][n].lookups == 0]
    if not names or start.split(" (")[0] in world.namesakes:
        return None
    name = rng.choice(names)
    value, want_same = world.facts[start][name].value, rng.random() < 0.5
    for other in rng.sample(world.titles[owner], min(300, len(world.titles[owner]))):
        fact = world.facts[other].get(name)
        if (other == start or fact is None or fact.lookups or not _in_split(other, split)
                or other.split(" (")[0] in world.namesakes):
            continue
        if kind == "comparison" and fact.value[:2] != value[:2]:  # centuries differ
            goal = rng.choice(("earlier", "later"))
            text = f"Which has the {goal} {name}, {start} or {other}?"
            answer = start if (value < fact.value) == (goal == "earlier") else other
            break
        if kind == "yes_no" and (fact.value == value) == want_same:
            goal, text = "same", f"Do {start} and {other} have the same {name}?"
            answer = "yes" if want_same else "no"
            break
    else:
        return None
    return _question(world, kind, (start, other), (name,), goal, text, answer, (start, other),
                     {kind})


def make_questions(world, num, seed=0, split=None, max_hops=4, kinds=None):
    """-> `num` different questions. Splits ("train", "eval") share no title that a plan starts
    at, so they are disjoint in chains. ValueError when the world does not hold so many."""
    rng = random.Random(f"questions {world.seed} {seed} {split}")
    starts = [t for t in world.facts if _in_split(t, split)]
    special = [t for t in starts if t.split(" (")[0] in world.namesakes]
    kinds = kinds or ("bridge",) * 6 + ("lookup", "similar", "comparison", "yes_no")
    found = {}
    for _ in range(num):
        kind = rng.choice(kinds)
        for _ in range(1000):
            start = rng.choice(special if kind == "similar" and special else starts)
            question = (_pair(world, rng, start, kind, split) if kind in ("comparison", "yes_no")
                        else _chain(world, rng, start, max_hops))
            if question and question.kind == kind and question.id not in found:
                found[question.id] = question
                break
        else:
            raise ValueError(f"a wiki of {len(world.wiki)} articles does not hold {num} questions "
                             f"of this sort (split={split}, max_hops={max_hops}, kind {kind})")
    return list(found.values())


LABEL_WORDS = "|".join(word for words in LABELS.values() for word in words)


def read_value(relation, subject, observation):
    """The value of a relation as an observation tells it, or None. `subject` is the title of
    the page. Knows the wordings, as any reader does, and nothing of the world."""
    who = f"(?:[Tt]he (?:{LABEL_WORDS})|{re.escape(subject.split(' (')[0])})"
    for sentence in re.split(r"(?<=\.) ", re.sub(r"^\(Result \d+ / \d+\) ", "", observation)):
        for wording in RELATION[relation].sentences:
            pattern = re.escape(wording).replace(r"\{S\}", who).replace(r"\{s\}", who)
            match = re.fullmatch(pattern.replace(r"\{o\}", "(?P<o>.+?)"), sentence)
            if match:
                return match["o"]
    return None


def turn(thought, kind, argument):
    """The text of one turn, as it stands after "Thought:"."""
    return f" {thought}\nAction: {kind}[{argument}]"


def never(fault, **circumstances):
    """The oracle's slips: none."""
    return False


def oracle(question, slip=never):
    """Generator: yields the text of a turn, is sent the observation. It knows the plan of the
    question and reads every value from observations. `slip(fault, **circumstances) -> bool`
    decides where it goes wrong: warm_start.py makes flawed demonstrations of it."""
    values = []
    for start in question.starts:
        thought = (f"The {question.relations[-1]} is {values[-1]}." if values else
                   f"I look for {start.split(' (')[0]}.")
        value = yield from _walk(question, start, thought, slip)
        if value is None:
            yield turn("I do not know.", "Finish", "unknown")
            return
        values.append(value)
        if question.goal in ("earlier", "later") and slip("one_side"):
            break
        if question.goal == "same" and slip("assume_yes"):
            break
    last = f"The {question.relations[-1]} is {value}."
    if question.goal == "value":
        yield turn(last, "Finish", value)
    elif question.goal == "same":
        answer = "yes" if len(set(values)) == 1 else "no"
        yield turn(last, "Finish", answer)
    else:
        pick = (min if question.goal == "earlier" else max)(values)
        yield turn(last, "Finish", question.starts[values.index(pick)])


def _walk(question, start, thought, slip):
    """Follow the relations from `start`; returns the last value, None where it is lost."""
    page = start.split(" (")[0]
    observation = yield turn(thought, "Search", page)
    if page != start:
        page, observation = yield from _choose(page, start, observation, slip)
        if page is None:
            return None
    for hop, name in enumerate(question.relations, 1):
        value = read_value(name, page, observation)
        neighbour = RELATION[name].neighbour
        other = read_value(neighbour, page, observation) if neighbour else None
        if other and slip("confuse", relation=name):
            value = other
        elif value is None and slip("no_lookup"):
            value = next((v for r in RELATIONS if r.target == RELATION[name].target
                          and (v := read_value(r.name, page, observation))), None)
        while value is None:
            if observation.startswith(("No more", "Could not")):
                return None
            observation = yield turn(f"The {name} is not shown.", "Lookup", RELATION[name].keyword)
            value = read_value(name, page, observation)
        if hop == len(question.relations) or (hop >= 2 and slip("early_stop", left=len(
                question.relations) - hop)):
            return value
        page = value
        observation = yield turn(f"The {name} is {value}.", "Search", value)


def _choose(bare, start, observation, slip):
    """Pick the title that is meant from a page of namesakes or a list of similar titles."""
    options = [title for title in re.findall(r"[A-Z]\w+ \(\w+\)", observation)
               if title.startswith(bare + " ")]
    if observation.startswith("Could not") and slip("give_up"):
        return None, observation
    picks = options[:1] if slip("first_choice") else [t for t in options if t == start]
    for page in picks:
        observation = yield turn(f"I choose {page}.", "Search", page)
    if page != start and not slip("no_check"):
        observation = yield turn("This is the wrong page.", "Search", start)
        page = start
    return page, observation


def run_agent(env, question, agent):
    """Play one episode -> (final Episode, texts of the turns, observations)."""
    episode, texts, observations = env.reset(question), [], []
    text = next(agent)
    while True:
        texts.append(text)
        episode = env.step(episode, text.partition("Action: ")[2])
        observations.append(episode.observation)
        if episode.done:
            return episode, texts, observations
        text = agent.send(episode.observation)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--articles", type=int, default=1000, help="articles in the wiki")
    parser.add_argument("--seed", type=int, default=0, help="seed of the wiki")
    parser.add_argument("--oracle", type=int, metavar="N", help="let the oracle answer N questions")
    args = parser.parse_args()
    world = make_world(args.articles, args.seed)
    env = ReActEnv(world.wiki)
    questions = make_questions(world, args.oracle or 8)
    solved, turns = 0, Counter()
    for question in questions:
        episode, texts, observations = run_agent(env, question, oracle(question))
        solved += episode.reward
        turns[episode.turn] += 1
        if not args.oracle:
            print(f"\nQuestion ({question.kind}, {question.num_hops} hops): {question.text}")
            for text, observation in zip(texts, observations):
                print(f"Thought:{text}\nObservation: {observation}")
    print(f"oracle: {solved:.0f} of {len(questions)} solved; episodes by number of turns: "
          + ", ".join(f"{n}: {turns[n]}" for n in sorted(turns)))


if __name__ == "__main__":
    main()
