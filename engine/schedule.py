"""How many rollouts a budget in sampled tokens buys."""
from dataclasses import dataclass

from engine.errors import NotFinite, UsageError

WARM_UP = 2       # steps in which the learning rate rises
MOST_BAD = 10     # steps in a row whose numbers are not finite, then a run stops by itself
COST_DECAY = 0.7  # per step, of the counts from which the cost of a rollout is forecast


@dataclass
class Schedule:
    """`budget` tokens per step from the start: what earlier steps overspent or left is carried
    over. A bare rollout costs, with its continuations, what they cost lately."""
    budget: int
    num_continuations: int     # N, per bare rollout
    num_rollouts: float = 0.0  # lately: decayed per step
    tokens: float = 0.0        # ... that they and their continuations took
    step: int = 0
    sampled_tokens: int = 0    # since the start
    bad_steps: int = 0         # in a row, with numbers that were not finite

    def guess(self, episode_tokens):
        """Before the first step, worth two rollouts; a continuation costs 0.6 of an episode."""
        self.num_rollouts = 2.0
        self.tokens = 2 * max(1.0, episode_tokens) * (1 + 0.6 * self.num_continuations)

    def num_bare(self):
        """M, at least 2."""
        left = self.budget * (self.step + 1) - self.sampled_tokens
        return max(2, int(left * self.num_rollouts / max(self.num_rollouts, self.tokens)))

    def rate(self, num_steps):
        """Share of the learning rate in the next step: it rises over the first steps, then falls
        linearly towards 0, where the last step would have a next one."""
        left = (num_steps - self.step) / max(1, num_steps - WARM_UP)
        return min(1.0, (self.step + 1) / WARM_UP, left)

    def advance(self, num_bare, tokens, finite=True):
        """A step is done: what it spent, and whether its numbers were finite."""
        self.step += 1
        if not tokens:
            raise UsageError(f"step {self.step}: no question left room for a turn; --context must "
                             "be larger or --turn-tokens smaller, in a new run")
        self.sampled_tokens += tokens
        self.bad_steps = 0 if finite else self.bad_steps + 1
        self.num_rollouts = COST_DECAY * self.num_rollouts + num_bare
        self.tokens = COST_DECAY * self.tokens + tokens

    @property
    def broken(self):
        """Have the numbers not been finite for too long?"""
        return self.bad_steps >= MOST_BAD

    def check(self, folder):
        """NotFinite where that is so."""
        if self.broken:
            raise NotFinite(f"{folder}: saved and stopped: in the last {MOST_BAD} steps a loss or "
                            "gradient was not finite; try a smaller --learning-rate")


def parse_evaluations(text):
    """"0:500,50:100,100:500" -> {0: 500, 50: 100, 100: 500}: how many questions are asked after
    which percent of the steps. A single number stands for 0 and 100 percent, which both must be
    given."""
    parts, found = text.split(","), {}
    if text.isdecimal():
        parts = [f"0:{text}", f"100:{text}"]
    for part in parts:
        share, colon, num = part.partition(":")
        if share.isdecimal() and num.isdecimal() and int(share) <= 100 and int(num) > 0:
            found[int(share)] = int(num)
    if len(found) < len(parts) or not {0, 100} <= set(found):
        raise UsageError(f"--eval-questions {text}: give a number, or percents from 0 to 100 with "
                         "numbers, as in 0:500,50:100,100:500")
    return found


def due_evaluations(shares, num_steps):
    """{percent of the steps: questions} -> {step: questions}; of two on one step the more."""
    due = {}
    for share, num in shares.items():
        step = round(share * num_steps / 100)
        due[step] = max(num, due.get(step, 0))
    return due
