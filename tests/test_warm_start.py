"""The making of the tiny policy: its tokenizer, its wiring, its faults. No training here."""
import itertools
import random

import pytest
import torch
from warm_start import FAULTS, as_llama, demonstrations, flawed, make_model, make_tokenizer

from toy_wiki import never


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


def test_flawed_demonstrations_fail_and_clean_ones_do_not():
    def solved(slip):
        texts = ("".join(text for text, _ in pieces)
                 for pieces in itertools.islice(demonstrations(5, slip), 200))
        return sum("Finish[unknown]" not in text for text in texts)
    assert solved(never) == 200 > solved(flawed(random.Random(0)))
    assert {fault for fault in FAULTS} >= {"early_stop", "confuse", "give_up", "no_lookup"}
