"""Questions to train on and to evaluate on, and the pool from which each step draws."""
from collections import Counter, defaultdict
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from engine.errors import UsageError
from engine.files import fingerprint
from react_env import ReActEnv, normalize_answer
from tree import leaves
from world.files import load_questions
from world.toy import HOP_MIX, make_questions, make_world, parse_hop_mix

NUM_ARTICLES = 1000   # of the toy wiki
NUM_QUESTIONS = 4000  # of the toy wiki, to train on
MAX_TURNS = 8         # of an episode, Finish included
COUNT_DECAY = 0.9     # of counted outcomes, whenever a step adds to them


class Data(NamedTuple):
    """Questions to train and to evaluate on, disjoint, with the environments they live in."""
    env: ReActEnv
    train: list
    eval_env: ReActEnv
    eval: list
    num_eval: int        # how many of `eval` are wanted
    notice: str = ""     # lines about questions that were left out

    def fingerprints(self):
        """{what: hash of its content}, to know it again on --resume; of a file that is only
        scored nothing."""
        if not self.train:
            return {}
        questions = [(q.id, q.text, q.answers) for q in self.train + self.eval]
        return {"questions": fingerprint(questions),
                "wiki": fingerprint([self.env.wiki.pages, self.eval_env.wiki.pages])}

    def that_fit(self, policy):
        """The same, without questions whose prompt leaves no room for a turn (but where they are
        only scored)."""
        if not self.train:
            return self

        def fits(question):
            return policy.root(question, self.env).length + policy.turn_tokens <= policy.context
        train, held_out = list(filter(fits, self.train)), list(filter(fits, self.eval))
        if not (train and held_out):
            raise UsageError(f"in a context of {policy.context} tokens, too few questions leave "
                             "room for a turn; see --context and --turn-tokens")
        num = len(self.train + self.eval) - len(train + held_out)
        notice = self.notice + left_out(num, "are too long")
        return self._replace(train=train, eval=held_out[:self.num_eval], notice=notice)


def load_data(config):
    """-> Data of `config.data`: the toy wiki, or a file with a fifth of it held out."""
    num_eval = max(config.evaluations.values())
    if config.data == "toy":
        world = make_world(NUM_ARTICLES, config.wiki_seed)
        env, mix = ReActEnv(world.wiki, MAX_TURNS), parse_hop_mix(config.hop_mix)
        train = [] if config.scores_others else make_questions(
            world, NUM_QUESTIONS, split="train", hop_weights=mix)
        try:
            held_out = make_questions(world, num_eval, split="eval", hop_weights=mix)
        except UsageError as error:
            raise UsageError(f"--eval-questions: {error}") from None
        return Data(env, train, env, held_out, num_eval)
    everything = config.scores_others  # also by a run on another mix, or after a cold start
    if (config.cold_start or config.hop_mix != HOP_MIX) and not (everything and config.resume):
        raise UsageError("--cold-start and --hop-mix go with --data toy")
    questions, env, notice = load_file(config.data, everything)
    if everything:
        return Data(env, [], env, questions, len(questions), notice)
    held_out, eval_env = [q for q in questions if is_held_out(q)], env
    if config.eval_data:
        held_out, eval_env, more = load_file(config.eval_data, False)
        notice += more
    known = {question.id for question in held_out}
    questions = [question for question in questions if question.id not in known]
    if not questions or not held_out:
        raise UsageError(f"--data {config.data}: too few questions to train and to evaluate on")
    return Data(env, questions, eval_env, held_out, num_eval, notice)


def load_file(file, everything):
    """-> (questions, environment, a notice). Left out, and counted: what the file calls
    unanswerable, whose id is that of a twin; and what has no text or no answer, but where
    `everything` is to be answered."""
    found, wiki = load_questions(file)
    questions = [q for q in found if q.kind != "unanswerable"]
    if not everything:
        questions = [q for q in questions if q.text.strip() and any(
            normalize_answer(answer) for answer in q.answers)]
    if not questions:
        raise UsageError(f"{file}: no question that has an answer")
    id, num = Counter(question.id for question in questions).most_common(1)[0]
    if num > 1:
        raise UsageError(f"{file}: {num} questions have the id {id}")
    told = left_out(len(found) - len(questions), f"of {file} have no answer, or no text,")
    return questions, ReActEnv(wiki, MAX_TURNS), told


def left_out(num, why):
    """A line for `num` questions, "" for none."""
    return f"\n{num} questions {why} and are left out" if num else ""


def is_held_out(question):
    """A fifth of all questions, by hash of the id."""
    id = question.id.encode(errors="surrogatepass")
    return int.from_bytes(blake2b(id, digest_size=4).digest()) % 5 == 0


def summarise(questions, scores, first=None):
    """Means of scores, {question id: {em, f1}}: em, em_first (of the `first` questions), f1 (all
    0 to 1), and em by hop count and by kind."""
    questions = [question for question in questions if question.answers]  # none in a test split
    em = [scores[question.id]["em"] for question in questions]
    f1 = [scores[question.id]["f1"] for question in questions]
    groups = defaultdict(list)
    for question, right in zip(questions, em):
        groups["by_hops", str(question.num_hops)].append(right)
        groups["by_kind", question.kind].append(right)
    means = {"num_questions": len(questions), "em": mean(em), "em_first": mean(em[:first]),
             "f1": mean(f1), "by_hops": {}, "by_kind": {}}
    for name, group in sorted(groups):
        means[name][group] = mean(groups[name, group])
    return means


def mean(values):
    return float(np.mean(values)) if values else None


class Prompts:
    """The questions to train on, in an endless shuffle, and what came of each lately."""

    def __init__(self, questions, seed):
        self.questions, self.seed = questions, seed
        self.cursor = 0   # questions drawn so far
        self.counts = {}  # question id: (successes, failures) of bare rollouts, decayed

    def draw(self, num):
        """The next `num` different questions, or all where there are not so many."""
        pool, num = {}, min(num, len(self.questions))
        while len(pool) < num:
            epoch, place = divmod(self.cursor, len(self.questions))
            order = np.random.default_rng([self.seed, 1, epoch]).permutation(len(self.questions))
            for i in order[place:]:
                if len(pool) == num:
                    break
                pool[self.questions[i].id] = self.questions[i]
                self.cursor += 1
        return list(pool.values())

    def seen(self, roots):
        """Successes and failures so far at these prompts, [2, n]."""
        counts = [self.counts.get(root.state.question.id, (0.0, 0.0)) for root in roots]
        return np.array(counts).T

    def record(self, roots):
        """Count the outcomes of these prompts' bare rollouts."""
        for root, (wins, losses) in zip(roots, self.seen(roots).T):
            rewards = [leaf.reward for leaf in leaves(root)]
            won = sum(rewards)
            self.counts[root.state.question.id] = (
                float(COUNT_DECAY * wins + won), float(COUNT_DECAY * losses + len(rewards) - won))

    @property
    def coverage(self):
        """Share of the questions that were ever rolled out."""
        return len(self.counts) / len(self.questions)

    def state_dict(self):
        return {"cursor": self.cursor, "counts": self.counts}

    def load_state_dict(self, state):
        self.cursor, self.counts = state["cursor"], state["counts"]
