"""A fictional Wikipedia made from a seed, and its questions.

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
- namesakes share a bare name: `Search[Belkan]` meets a page that lists them, or finds
  nothing and answers with similar titles, of which one is meant.

Questions are plans over functional relations, so every answer is unique by construction.
`python -m world.oracle` prints a few questions and how they are answered.

The order of the random draws *is* the world: whoever moves one makes another world, for
which the embedded policies were not made.
"""
import hashlib
import itertools
import random
from dataclasses import dataclass
from typing import NamedTuple

from engine.errors import UsageError
from react_env import SHOWN_SENTENCES, Question, Wiki
from world.words import (
    ADJECTIVES,
    FILLERS,
    GIVEN,
    LABELS,
    NOUNS,
    RELATION,
    RELATIONS,
    SHARES,
    SYLLABLES,
    TYPE_OF,
)


class Fact(NamedTuple):
    value: str    # title of an article, or a plain word
    lookups: int  # how many Lookup calls it takes to read it; 0 where Search shows it


class World(NamedTuple):
    """A generated wiki with the facts behind it (the agent sees only `wiki`)."""
    wiki: Wiki
    facts: dict   # title -> {relation name: Fact}
    labels: dict  # title -> what it is, in one word ("painter", "town")
    titles: dict  # entity type -> titles, in a fixed order
    seed: int

    def shown(self, title, relation):
        """The value of a relation where Search shows it, else None."""
        fact = self.facts[title].get(relation)
        return fact.value if fact and not fact.lookups else None


def bare(title):
    """A title without what tells namesakes apart: "Belkan" of "Belkan (painter)"."""
    return title.split(" (")[0]


def is_namesake(title):
    """Only namesakes have a label in their title."""
    return " (" in title


# ---------------------------------------------------------------- the world
def _syllables(rng, number=2):
    return "".join(rng.choices(SYLLABLES, k=number)).capitalize()


def _names(rng, kind):
    """Endless names in the manner of an entity type; longer ones when the short run out."""
    for attempt in itertools.count():
        if kind == "person":
            yield f"{rng.choice(GIVEN)} {_syllables(rng)}"
        elif kind == "work":
            title = f"The {rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"
            yield title
            yield f"{title} of {_syllables(rng)}"
        else:
            ending = "ia" if kind == "country" else ""
            yield _syllables(rng, min(2 + attempt // 3, 4)) + ending


def _new_name(rng, kind, taken):
    """The first name that is not taken; now it is."""
    name = next(name for name in _names(rng, kind) if name not in taken)
    taken.add(name)
    return name


def make_world(num_articles=1000, seed=0):
    """World of exactly `num_articles` articles (at least 100), the same for the same seed."""
    if num_articles < 100:
        raise UsageError(f"num_articles must be at least 100, got {num_articles}")
    rng = random.Random(f"world {seed}")
    counts = {kind: int(share * num_articles) for kind, share in SHARES.items()}
    labels, pages, taken = {}, {}, set()

    # Namesakes: two or three articles with one bare name. Half of these groups have a page
    # of their own that lists them.
    for group in range((num_articles - sum(counts.values())) // 3):
        name = _new_name(rng, "town", taken)
        own_labels = rng.sample(LABELS["person"], 2)
        if group % 2:
            own_labels.append("town")
        rng.shuffle(own_labels)
        members = [f"{name} ({label})" for label in own_labels]
        labels.update(zip(members, own_labels))
        if group % 2 == 0:
            pages[name] = [f"{name} may refer to {', '.join(members)}."]
    counts["person"] += num_articles - len(labels) - len(pages) - sum(counts.values())
    for kind, count in counts.items():
        for _ in range(count):
            label = rng.choice(LABELS[kind])
            title = _new_name(rng, kind, taken)
            if kind == "institution":
                title = f"{title} {label.capitalize()}"
            if kind == "event":
                title = f"{label.capitalize()} of {title}"
            labels[title] = label

    titles = {kind: [] for kind in SHARES}
    for title, label in labels.items():
        titles[TYPE_OF[label]].append(title)
    facts = {}
    for title, label in labels.items():
        facts[title], pages[title] = _article(rng, title, label, titles)
    order = list(pages)
    rng.shuffle(order)
    wiki = Wiki((title, pages[title]) for title in order)
    return World(wiki, facts, labels, titles, seed)


def _article(rng, title, label, titles):
    """-> ({relation: Fact}, [sentences]). Two in five articles are long."""
    relations = [r for r in RELATIONS if r.owner == TYPE_OF[label]]
    is_long = rng.random() < 0.4
    chosen = rng.sample(relations, len(relations) if is_long else 4)
    told = {}  # sentence: (relation, value)
    for relation in chosen:
        value = _value(rng, relation.target, titles)
        while value == title:  # a person is not the teacher of that same person
            value = _value(rng, relation.target, titles)
        subject = f"the {label}" if rng.random() < 0.7 else bare(title)
        sentence = rng.choice(relation.sentences).format(s=subject, o=value)
        told[sentence[0].upper() + sentence[1:]] = relation, value
    sentences = list(told)
    if is_long:  # fillers and a false friend push facts behind the fifth sentence
        for filler in rng.sample(FILLERS, rng.randint(1, 2)):
            sentences.insert(rng.randrange(len(sentences)), filler)
        friend = rng.choice(chosen)
        if friend.target == "person" and rng.random() < 0.5:
            others = [name for name in rng.sample(titles["person"], 2) if name != title]
            place = rng.randrange(len(sentences))
            sentences.insert(place, f"An earlier {friend.name} is {rng.choice(others)}.")
    sentences.insert(0, f"{bare(title)} is {'an' if label[0] in 'aeiou' else 'a'} {label}.")
    facts = {}
    for sentence, (relation, value) in told.items():
        place = sentences.index(sentence)
        lookups = 0
        if place >= SHOWN_SENTENCES:  # Lookup shows the earlier ones with this keyword first
            earlier = [s for s in sentences[:place] if relation.keyword in s.lower()]
            lookups = len(earlier) + 1
        facts[relation.name] = Fact(value, lookups)
    return facts, sentences


def _value(rng, target, titles):
    if target == "year":
        return str(rng.randrange(1000, 2000))
    if target == "coin":
        return _syllables(rng)
    return rng.choice(titles[target])


# ---------------------------------------------------------------- its questions
HOP_MIX = "36,32,22,10"  # percent: how often a chain of 1, 2, ... hops is tried
MOST_TURNS = 7  # that the oracle may need: chains of at most six hops
CHAINS = ("bridge",) * 6 + ("lookup", "similar")
KINDS = CHAINS + ("comparison", "yes_no")


@dataclass(frozen=True)
class ToyQuestion(Question):
    """A question with the plan behind it, for the oracle and the demonstrations only."""
    starts: tuple = ()     # titles where the plan begins: one, or two to be compared
    relations: tuple = ()  # relation names, first hop first
    goal: str = "value"    # value | earlier | later | same


def parse_hop_mix(text):
    """"36,32,22,10" -> (0.36, 0.32, 0.22, 0.1): percent of chains with 1, 2, ... hops."""
    parts = text.split(",")
    if not all(map(str.isdecimal, parts)) or len(parts) > 6 or sum(map(int, parts)) != 100:
        raise UsageError(f"--hop-mix {text}: give percents of 1, 2, ... up to 6 hops that add up "
                         "to 100, as in 36,32,22,10")
    return tuple(int(part) / 100 for part in parts)


HOP_WEIGHTS = parse_hop_mix(HOP_MIX)


def _question(world, kind, starts, relations, goal, text, answer, path):
    plan = repr((starts, relations, goal)).encode()
    return ToyQuestion(
        f"toy{world.seed}-{hashlib.blake2b(plan, digest_size=6).hexdigest()}", text,
        (answer,), kind, len(relations) * len(starts), tuple(path), "toy",
        starts, relations, goal)


def _in_split(title, split):
    """A title belongs to one split for good: a quarter of the starts is for evaluation."""
    held_out = hashlib.blake2b(title.encode(), digest_size=2).digest()[0] < 64
    return split is None or held_out == (split == "eval")


def _chain(world, rng, start, hop_weights):
    """A chain of facts from `start`, or None where it ends early, circles or takes too long."""
    num_hops = rng.choices(range(1, len(hop_weights) + 1), hop_weights)[0]
    title = start
    path, relations = [], []
    num_lookups = 0
    for _ in range(num_hops):
        if title not in world.facts or title in path:
            return None
        path.append(title)
        name = rng.choice(list(world.facts[title]))
        relations.append(name)
        title, lookups = world.facts[title][name]
        num_lookups += lookups
    kind, phrase = "bridge", start
    num_turns = num_hops + 1 + num_lookups
    if num_lookups:
        kind = "lookup"
    if is_namesake(start):
        kind = "similar"
        phrase = f"the {world.labels[start]} {bare(start)}"
        num_turns += 1
    if num_turns > MOST_TURNS:
        return None
    for name in relations:
        phrase = rng.choice(RELATION[name].nouns).format(x=phrase)
    word = "Who" if RELATION[name].target == "person" else "What"
    return _question(world, kind, (start,), tuple(relations), "value",
                     f"{word} is {phrase}?", title, path)


def _pair(world, rng, start, kind, split):
    """A comparison of years, or a yes/no question whether two articles share a value."""
    targets = ("year",) if kind == "comparison" else world.titles
    names = [r.name for r in RELATIONS
             if r.target in targets and world.shown(start, r.name)]
    if not names or is_namesake(start):
        return None
    name = rng.choice(names)
    value = world.shown(start, name)
    want_same = rng.random() < 0.5
    like = world.titles[TYPE_OF[world.labels[start]]]
    for other in rng.sample(like, min(300, len(like))):
        theirs = world.shown(other, name)
        if other == start or not theirs or is_namesake(other) or not _in_split(other, split):
            continue
        if kind == "comparison":
            if theirs[:2] == value[:2]:  # of one century
                continue
            goal = rng.choice(("earlier", "later"))
            text = f"Which has the {goal} {name}, {start} or {other}?"
            answer = start if (value < theirs) == (goal == "earlier") else other
        else:
            if (theirs == value) != want_same:
                continue
            goal = "same"
            text = f"Do {start} and {other} have the same {name}?"
            answer = "yes" if want_same else "no"
        starts = (start, other)
        return _question(world, kind, starts, (name,), goal, text, answer, starts)
    return None


def make_questions(world, num, seed=0, split=None, hop_weights=HOP_WEIGHTS, kinds=None):
    """-> `num` different questions. Splits ("train", "eval") share no title that a plan starts
    at, so they are disjoint in chains. UsageError when the world does not hold so many. Where
    `kinds` does not say it, comparisons, which have two hops, are asked if these have a weight."""
    kinds = kinds or (KINDS if sum(hop_weights[1:2]) else CHAINS)
    rng = random.Random(f"questions {world.seed} {seed} {split}")
    starts = [title for title in world.facts if _in_split(title, split)]
    special = [title for title in starts if is_namesake(title)]
    found = {}
    for _ in range(num):
        kind = rng.choice(kinds)
        for _ in range(1000):
            start = rng.choice(special if kind == "similar" and special else starts)
            if kind in ("comparison", "yes_no"):
                question = _pair(world, rng, start, kind, split)
            else:
                question = _chain(world, rng, start, hop_weights)
            if question and question.kind == kind and question.id not in found:
                found[question.id] = question
                break
        else:
            raise UsageError(f"a wiki of {len(world.wiki)} articles does not hold {num} questions "
                             f"of this sort (split {split}, hops {hop_weights}, kind {kind})")
    return list(found.values())
