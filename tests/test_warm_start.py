"""The making of the tiny policy: its tokenizer, its wiring, its faults. No training here."""
import hashlib
import itertools
import random

import pytest
import torch

from react_env import ReActEnv
from world.oracle import never, oracle, run_agent
from world.toy import HOP_WEIGHTS, make_questions, make_world
from world.warm_start import (
    FAULTS,
    as_llama,
    demonstrations,
    flawed,
    make_model,
    make_tokenizer,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make_model().eval()


def test_a_name_has_the_same_tokens_everywhere():
    tokenizer = make_tokenizer(num_texts=300)
    for name in ("Belkan", "Ada Mirsal", "The Silver Bridge", "Kanrelia"):
        alone = tokenizer.tokenize(name)
        for before in (" ", "[", "by "):
            assert tokenizer.tokenize(f"{before}{name}.")[-len(alone) - 1:-1] == alone
    text = "Search[Belkan]\nObservation: born in 1742.  你 <|end|> é"
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert tokenizer.decode(ids) == text


def test_wired_heads_copy(model):
    """On random ids said twice, untrained: a head of layer 1 looks, ten times as often as by
    chance, at what followed the present id the first time."""
    model.set_attn_implementation("eager")
    generator = torch.Generator().manual_seed(3)
    once = torch.randperm(model.config.vocab_size, generator=generator)[:40]
    ids = torch.cat([once, once])[None]
    with torch.no_grad():
        attention = model(ids, output_attentions=True).attentions[1]
    places = torch.arange(41, 79)  # the second time; what followed the first stands 39 before
    assert attention[0, :, places, places - 39].mean(1).max() > 10 / 60


def test_as_llama_is_the_same_function(model):
    model.set_attn_implementation("sdpa")
    ids = torch.arange(50)[None]
    with torch.no_grad():
        assert torch.equal(as_llama(model).eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("fault", ["confuse", *FAULTS])
def test_every_fault_makes_wrong_answers(fault):
    """A demonstrator with this fault alone fails somewhere; without any it never does. (A wrong
    first choice is repaired unless nothing is checked, so those two come together.)"""
    world = make_world(200, 0)
    env = ReActEnv(world.wiki, max_turns=8)
    questions = make_questions(world, 100, hop_weights=HOP_WEIGHTS[:3])
    choices = ("first_choice", "no_check")
    together = choices if fault in choices else (fault,)

    def solved(slip):
        return sum(run_agent(env, q, oracle(q, slip))[-1][1].reward for q in questions)
    assert solved(never) == 100
    assert solved(lambda name, relation=None: name in together) < 100


def test_the_flawed_demonstrations_are_those_that_tiny_was_taught_by():
    """Guards the order of the random draws, and what the oracle says where it slips."""
    taught = list(itertools.islice(demonstrations(3, flawed(random.Random(3))), 400))
    assert hashlib.sha256(repr(taught).encode()).hexdigest()[:16] == "5928f3fc948e307d"
