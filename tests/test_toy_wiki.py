"""The toy Wikipedia: its size, its traps, its splits, and an oracle that solves everything."""
from collections import Counter

import pytest

from react_env import ReActEnv
from world.toy import make_questions, make_world, oracle, read_value, run_agent
from world.words import RELATION, RELATIONS

WORLD = make_world(1000, 0)


@pytest.mark.parametrize("num", [100, 101, 333, 1000, 5000])
def test_size_is_exact(num):
    assert len(make_world(num, 7).wiki) == num


def test_same_seed_same_world():
    again, other = make_world(1000, 0), make_world(1000, 1)
    assert all(WORLD.wiki.text(title) == again.wiki.text(title) for title in WORLD.wiki.titles)
    assert len(set(WORLD.wiki.titles) & set(other.wiki.titles)) < 150  # English words, given names
    assert make_questions(WORLD, 50) == make_questions(again, 50)


def test_the_oracle_solves_every_question_within_seven_turns():
    """It reads values from observations only. Long form: python toy_wiki.py --oracle 10000"""
    for world in (WORLD, make_world(150, 5)):
        env, kinds, turns = ReActEnv(world.wiki, max_turns=7), Counter(), Counter()
        for question in make_questions(world, 1500 if world is WORLD else 150):
            episode, _, _ = run_agent(env, question, oracle(question))
            assert episode.reward == 1.0, question
            kinds[question.kind] += 1
            turns[episode.turn] += 1
        assert set(kinds) == {"bridge", "lookup", "similar", "comparison", "yes_no"}
        assert {2, 3, 4, 5, 6} <= set(turns) <= {2, 3, 4, 5, 6, 7}


def test_the_oracle_is_blind_without_observations():
    """Guards "only from observations": with every article emptied it finds nothing."""
    question = next(q for q in make_questions(WORLD, 50) if q.kind == "bridge")
    agent = oracle(question)
    next(agent)
    text = agent.send("Nothing is written here.")
    assert question.answers[0] not in text


def test_splits_share_no_start():
    train, held_out = (make_questions(WORLD, 800, split=s) for s in ("train", "eval"))
    assert not {t for q in train for t in q.starts} & {t for q in held_out for t in q.starts}
    assert not {q.id for q in train} & {q.id for q in held_out}


def test_every_wording_holds_its_keyword_and_can_be_read():
    """Lookup finds a fact by its keyword, and a reader who knows the wordings reads the value."""
    for relation in RELATIONS:
        for wording in relation.sentences:
            sentence = wording.format(S="The painter", s="the painter", o="The Old Door of Belkan")
            assert relation.keyword in sentence.lower()
            assert read_value(relation.name, "Ada Belkan", sentence) == "The Old Door of Belkan"
            if relation.neighbour:
                assert read_value(relation.neighbour, "Ada Belkan", sentence) is None
                assert RELATION[relation.neighbour].target == relation.target


def test_facts_stand_where_they_are_said_to_stand():
    """lookups == 0: within the five sentences of Search; otherwise Lookup answers that often."""
    env, hidden = ReActEnv(WORLD.wiki, max_turns=99), 0
    question = make_questions(WORLD, 1)[0]
    for title in WORLD.wiki.titles[:300]:
        for name, fact in WORLD.facts.get(title, {}).items():
            episode, calls = env.step(env.reset(question), f"Search[{title}]"), 0
            while read_value(name, title, episode.observation) != fact.value:
                episode = env.step(episode, f"Lookup[{RELATION[name].keyword}]")
                calls += 1
            assert calls == fact.lookups
            hidden += fact.lookups > 0
    assert hidden > 50


def test_namesakes_are_met_on_a_page_or_in_the_similar_list():
    env, question = ReActEnv(WORLD.wiki), make_questions(WORLD, 1)[0]
    answers = Counter()
    for bare, titles in WORLD.namesakes.items():
        observation = env.step(env.reset(question), f"Search[{bare}]").observation
        assert all(title in observation for title in titles), observation
        answers[observation.startswith("Could not find")] += 1
    assert min(answers.values()) > 5


def test_too_many_questions_say_so():
    with pytest.raises(ValueError, match="does not hold"):
        make_questions(make_world(100, 0), 500, kinds=("similar",), max_hops=1)
    with pytest.raises(ValueError, match="num_articles"):
        make_world(99)
