"""Questions to train on and to evaluate on, where they come from, and greedy evaluation."""
from collections import Counter, defaultdict
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from react_env import ReActEnv, load_questions
from rollout import forget_caches, grow
from runs import UsageError
from toy_wiki import make_questions, make_world
from tree import sampled_tokens

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


def evaluate(policy, env, questions, progress=None, first=None):
    """Greedy episodes -> {em, em_first (of the `first` questions), f1 (0 to 1), tokens (sampled,
    per episode), by_hops, by_kind, by_trap (exact match of groups; toy questions name the traps
    they hold), predictions}."""
    scores, predictions, tokens = {}, {}, 0
    size = max(1, policy.cache_tokens // policy.context)
    for i in range(0, len(questions), size):
        roots = [policy.root(q, env) for q in questions[i:i + size]]
        for leaf in grow(policy, env, roots, [1] * len(roots), temperature=0):
            question = leaf.state.question
            predictions[question.id] = leaf.state.prediction or ""
            scores[question.id] = question.score(leaf.state.prediction)
        tokens += sum(sampled_tokens(root) for root in roots)
        forget_caches(roots)
        if progress:
            progress(len(roots))

    def mean_by(keys):
        groups = defaultdict(list)
        for q in questions:
            for key in keys(q):
                groups[str(key)].append(scores[q.id]["em"])
        return {name: float(np.mean(values)) for name, values in sorted(groups.items())}

    return {"em": float(np.mean([s["em"] for s in scores.values()])),
            "em_first": float(np.mean([scores[q.id]["em"] for q in questions[:first]])),
            "f1": float(np.mean([s["f1"] for s in scores.values()])),
            "tokens": tokens / len(questions), "by_hops": mean_by(lambda q: [q.num_hops]),
            "by_kind": mean_by(lambda q: [q.kind]),
            "by_trap": mean_by(lambda q: getattr(q, "traps", ())), "predictions": predictions}
