"""The making of the tiny policy: its tokenizer, its wiring, its faults. No training here."""
import random

import pytest
import torch

from react_env import ReActEnv
from world.toy import make_questions, make_world, never, oracle, run_agent
from world.warm_start import FAULTS, as_llama, flawed, make_model, make_tokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return make_model().eval()


def test_a_name_has_the_same_tokens_everywhere():
    tokenizer = make_tokenizer(num_texts=300)
    for name in ("Belkan", "Zelvor", "Ada Mirsal", "The Silver Bridge", "Kanrelia"):
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
        out = model(ids, output_attentions=True)
    places = torch.arange(41, 79)  # the second time; what followed the first stands 39 before
    followed = out.attentions[1][0, :, places, places - 39]
    assert followed.mean(1).max() > 10 / 60


def test_as_llama_is_the_same_function(model):
    model.set_attn_implementation("sdpa")
    ids = torch.arange(50)[None]
    with torch.no_grad():
        assert torch.equal(as_llama(model).eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_makes_wrong_answers(fault):
    """A demonstrator with this fault alone fails somewhere; without any it never does. (A wrong
    first choice is repaired unless nothing is checked, so those two come together.)"""
    world = make_world(200, 0)
    env, questions = ReActEnv(world.wiki, max_turns=8), make_questions(world, 100, max_hops=3)
    together = {fault, "no_check"} if fault == "first_choice" else {fault}
    if fault == "no_check":
        together.add("first_choice")

    def solved(slip):
        return sum(run_agent(env, q, oracle(q, slip))[0].reward for q in questions)
    assert solved(never) == 100
    assert solved(lambda name, **_: name in together) < 100


def test_flawed_slips_at_the_rates_of_faults():
    slip = flawed(random.Random(0))
    for fault, rate in FAULTS.items():
        for relation, rate in rate.items() if isinstance(rate, dict) else [(None, rate)]:
            often = sum(slip(fault, relation=relation) for _ in range(2000)) / 2000
            assert abs(often - rate) < 0.05
    assert not any(slip("confuse", relation="port") for _ in range(100))
