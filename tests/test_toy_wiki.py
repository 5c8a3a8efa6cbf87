"""The toy Wikipedia: its size, its traps, its splits, and an oracle that solves everything."""
import hashlib
from collections import Counter

import pytest

from engine.errors import UsageError
from react_env import ReActEnv
from world.oracle import oracle, read_value, run_agent
from world.toy import (
    CHAINS,
    bare,
    is_namesake,
    make_questions,
    make_world,
    parse_hop_mix,
)
from world.words import RELATION, RELATIONS

WORLD = make_world(1000, 0)


@pytest.mark.parametrize("num", [100, 101, 333, 5000])
def test_size_is_exact(num):
    assert len(make_world(num, 7).wiki) == num


def test_the_world_is_the_one_that_the_embedded_policies_were_made_for():
    """Guards the order of the random draws: whoever moves one makes another world."""
    told = [WORLD.wiki.text(title) for title in WORLD.wiki.titles]
    asked = [question.text for question in make_questions(WORLD, 300, split="train")]
    assert hashlib.sha256("\n".join(told + asked).encode()).hexdigest()[:16] == "1ad2142ffc427d82"


def test_the_oracle_solves_every_question_within_seven_turns():
    """It reads values from observations only. Long form: python -m world.oracle --num 10000"""
    env, kinds, turns = ReActEnv(WORLD.wiki, max_turns=7), set(), set()
    for question in make_questions(WORLD, 1500):
        episode = run_agent(env, question, oracle(question))[-1][1]
        assert episode.reward == 1.0, question
        kinds.add(question.kind)
        turns.add(episode.turn)
    assert kinds == {"bridge", "lookup", "similar", "comparison", "yes_no"}
    assert {2, 3, 4, 5, 6} <= turns


def test_splits_share_no_start():
    starts = {"train": set(), "eval": set()}
    for split, found in starts.items():
        for question in make_questions(WORLD, 800, split=split):
            found.update(question.starts)
    assert not starts["train"] & starts["eval"]


def test_every_wording_holds_its_keyword_and_can_be_read():
    """Lookup finds a fact by its keyword, and a reader who knows the wordings reads the value."""
    value = "The Old Door of Belkan"
    for relation in RELATIONS:
        for wording in relation.sentences:
            sentence = wording.format(s="the painter", o=value)
            sentence = sentence[0].upper() + sentence[1:]
            assert relation.keyword in sentence.lower()
            assert read_value(relation.name, "Ada Belkan", sentence) == value
            if relation.neighbour:
                assert read_value(relation.neighbour, "Ada Belkan", sentence) is None
                assert RELATION[relation.neighbour].target == relation.target


def test_facts_stand_where_they_are_said_to_stand():
    """lookups == 0: within the five sentences of Search; otherwise Lookup answers that often."""
    env, num_hidden = ReActEnv(WORLD.wiki, max_turns=99), 0
    for title, facts in list(WORLD.facts.items())[:300]:
        for name, fact in facts.items():
            episode = env.step(env.reset(None), f"Search[{title}]")
            while read_value(name, title, episode.observation) != fact.value:
                episode = env.step(episode, f"Lookup[{RELATION[name].keyword}]")
            assert episode.turn == fact.lookups + 1
            num_hidden += fact.lookups > 0
    assert num_hidden > 50


def test_namesakes_are_met_on_a_page_or_in_the_similar_list():
    env, found = ReActEnv(WORLD.wiki), Counter()
    for title in filter(is_namesake, WORLD.facts):
        observation = env.step(env.reset(None), f"Search[{bare(title)}]").observation
        assert title in observation
        found[observation.startswith("Could not find")] += 1
    assert min(found[True], found[False]) > 10


def test_the_mix_of_hops():
    """Long chains are the rule where the mix says so, and none is longer than it says."""
    assert parse_hop_mix("36,32,22,10") == (0.36, 0.32, 0.22, 0.1)
    assert {q.kind for q in make_questions(WORLD, 60, hop_weights=[0.5, 0, 0.5])} == set(CHAINS)
    hops = Counter(q.num_hops for q in make_questions(WORLD, 400, hop_weights=parse_hop_mix(
        "10,15,25,50"), kinds=("bridge",)))
    assert max(hops) == 4 and hops[4] > max(hops[1], hops[2])
    for wrong in ("", "50,49", "100,", "0.5,0.5", "-1,101", "10,10,10,10,10,10,40"):
        with pytest.raises(UsageError, match="add up"):
            parse_hop_mix(wrong)


def test_too_many_questions_say_so():
    with pytest.raises(UsageError, match="does not hold 2000"):
        make_questions(make_world(100, 0), 2000, hop_weights=[1])
