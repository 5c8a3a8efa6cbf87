"""The way on to TRL: our rollouts and credit in its GRPOTrainer. python -m lab.with_trl

`rollout_func(prompts, trainer)` returns exactly len(prompts) rows, one per turn with credit: its
prompt is all that stands before it, and its mask is 1 on what the policy wrote, so that shared
turns are trained once. TRL subtracts the mean reward of a group. So all rows are one group, the
reward is the credit, and an empty row carries minus the sum of all credit: the mean is zero, and
credit arrives as it is. With the loss "dapo" it is the loss of policy.update. Flags are those of
trace_mini.py, but a step makes as many rollouts as surely fit into its rows, whatever the
--budget. TRL's first step has a learning rate of 0. Needs `pip install trl`.
"""
import sys
from importlib.util import find_spec
from itertools import chain

from engine.command_line import Parser, run_main
from engine.errors import UsageError
from engine.processes import team
from engine.schedule import WARM_UP, Schedule
from policy import load_policy
from predictor import PREDICTORS
from trace_mini import State, evaluate, parse_config, train_step
from tree import path_ids
from world.questions import MAX_TURNS, Prompts, load_data

class Rows(Schedule):
    """As many bare rollouts in every step as surely fit into `budget` rows."""

    def num_bare(self):
        num = (self.budget - 1) // (MAX_TURNS + self.num_continuations * (MAX_TURNS - 1))
        if num < 2:
            raise UsageError(f"--rows {self.budget}: too few for two rollouts of {MAX_TURNS} turns")
        return num


class Lent:
    """The policy; TRL makes its updates, so credit is kept for it."""

    def __init__(self, policy):
        self.policy, self.credits = policy, []

    def __getattr__(self, name):
        return getattr(self.policy, name)

    def update(self, credits, learning_rate):
        self.credits = credits
        if self.policy.preamble:
            self.policy.preamble.cache = None  # of weights that TRL is about to change
        return {"update_skipped": 0}


def make_rollout_func(config, policy, data, rows):
    """-> rollout_func of a GRPOTrainer whose generation batch has so many rows."""
    state = State(Prompts(data.train, config.seed), Rows(rows, config.num_continuations))
    predictor, lent = PREDICTORS[config.predictor](policy, data.env, config.seed), Lent(policy)

    def rollout_func(prompts, trainer):
        train_step(config, state, lent, predictor, data)
        return rows_of(lent.credits, len(prompts))
    return rollout_func


def rows_of(credits, num):
    """`num` rows of the turns that have credit; the last ones are empty."""
    rows = []
    for node, value in chain(*(credit.items() for credit in credits)):
        if written := node.ids[:node.num_sampled].tolist():
            rows.append((path_ids(node.parent).tolist(), written, node.logprobs.tolist(),
                         [1] * len(written), float(value)))
    rows.append(([0], [0], [0.0], [0], -sum(value for *_, value in rows)))
    columns = map(list, zip(*rows, *[([0], [0], [0.0], [0], 0.0)] * (num - len(rows))))
    return dict(zip(("prompt_ids", "completion_ids", "logprobs", "env_mask", "credit"), columns))


def reward(completions, credit, **others):
    """The reward of a row is its credit."""
    return credit


def make_trainer(config, policy, data, rows, micro_rows=8, **options):
    """A GRPOTrainer of our policy's model."""
    from datasets import Dataset  # these two are optional
    from trl import GRPOConfig, GRPOTrainer

    settings = {"output_dir": config.out or "runs/trl", "max_steps": config.steps, "beta": 0.0,
                "per_device_train_batch_size": micro_rows, "num_generations": rows,
                "gradient_accumulation_steps": rows // micro_rows, "scale_rewards": "none",
                "steps_per_generation": rows // micro_rows, "loss_type": "dapo",
                "learning_rate": policy.learning_rate, "warmup_steps": WARM_UP, "report_to": "none",
                "use_cpu": policy.device.type == "cpu", "bf16": False, "logging_steps": 1,
                "save_strategy": "no", "gradient_checkpointing": False}
    questions = Dataset.from_dict({"prompt": ["ours are taken instead"] * rows})
    trainer = GRPOTrainer(
        policy.model, reward, GRPOConfig(**settings | options), questions, None, policy.tokenizer,
        rollout_func=make_rollout_func(config, policy, data, rows))
    for weight in policy.trained:  # of a model in 4 bits it makes them bfloat16
        weight.data = weight.data.float()
    return trainer


def main(arguments=None):
    """-> exit code, as trace_mini.main."""
    parser = Parser(__doc__, prog="lab.with_trl", epilog="and the flags of trace_mini.py")
    parser.add_argument("--rows", type=int, default=128, help="of TRL's batch [%(default)s]")
    args, others = parser.parse_known_args(arguments)

    def work():
        config = parse_config(others)
        if not find_spec("trl"):
            raise UsageError("TRL is not installed: pip install trl")
        Rows(args.rows, config.num_continuations).num_bare()  # before anything is loaded
        other = config.resume or config.eval_only or config.cold_start or team().count > 1
        if other or args.rows % 8:
            raise UsageError("--rows must be a multiple of 8; there is one process here, and no "
                             "--resume, --eval-only or --cold-start")
        policy = load_policy(config)
        data = load_data(config).that_fit(policy)
        make_trainer(config, policy, data, args.rows).train()
        print(f"held-out exact match {evaluate(policy, data.eval_env, data.eval)['em']:.3f}")
    return run_main("lab.with_trl", work)


if __name__ == "__main__":
    sys.exit(main())
