"""Questions to train on and to evaluate on, where they come from, and greedy evaluation."""
from collections import Counter
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from engine.runs import UsageError
from react_env import ReActEnv
from world.files import load_questions
from world.toy import make_questions, make_world

NUM_TOY_QUESTIONS = 4000


class Data(NamedTuple):
    env: ReActEnv
    train: list
    eval_env: ReActEnv
    eval: list


def load_data(config):
    """Questions to train and to evaluate on, disjoint, with the environments they live in."""
    num_eval = max(config.eval_questions, config.final_eval_questions)
    if config.data == "toy":
        world = make_world(config.articles, config.wiki_seed)
        env = ReActEnv(world.wiki, config.max_turns)
        num = min(NUM_TOY_QUESTIONS, 4 * config.articles)
        try:
            return Data(env, make_questions(world, num, split="train"),
                        env, make_questions(world, num_eval, split="eval"))
        except ValueError as error:
            raise UsageError(f"--eval-questions, --articles: {error}") from None
    questions, wiki = load_unique(config.data)
    env = eval_env = ReActEnv(wiki, config.max_turns)
    if config.eval_only and (config.out or not config.resume):  # a file named for it
        return Data(env, [], env, questions)
    if config.eval_data:
        held_out, eval_wiki = load_unique(config.eval_data)
        eval_env = ReActEnv(eval_wiki, config.max_turns)
    else:  # a fifth, by hash of the id
        held_out = [q for q in questions
                    if int.from_bytes(blake2b(q.id.encode(), digest_size=4).digest()) % 5 == 0]
    known = {q.id for q in held_out}
    questions = [q for q in questions if q.id not in known]
    if not questions or not held_out:
        raise UsageError(f"--data {config.data}: too few questions to train and to evaluate on")
    return Data(env, questions, eval_env, held_out[:num_eval])


def load_unique(file):
    """load_questions, where no id may stand twice: visits, scores and predictions go by it."""
    questions, wiki = load_questions(file)
    id, num = Counter(q.id for q in questions).most_common(1)[0]
    if num > 1:
        raise UsageError(f"{file}: {num} questions have the id {id}")
    return questions, wiki


def draw_pool(questions, num, cursor, seed):
    """The next `num` different questions (fewer where there are not so many) of an endless
    shuffle, one epoch after another. -> (questions, new cursor)"""
    pool = {}
    while len(pool) < min(num, len(questions)):
        epoch, place = divmod(cursor, len(questions))
        order = np.random.default_rng([seed, 1, epoch]).permutation(len(questions))
        for i in order[place:]:
            if len(pool) == num:
                break
            pool[questions[i].id] = questions[i]
            cursor += 1
    return list(pool.values()), cursor


