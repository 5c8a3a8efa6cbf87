"""Runs side by side: who is compared with whom, and what is said of it."""
import json
from dataclasses import asdict

import pytest
from conftest import assert_refused

import lab.compare
from engine.tell import LAPS
from lab.compare import RECORDED, arms_of, main, spread
from lab.tables import read_rows
from trace_mini import Config, parse_config


@pytest.fixture
def made(tmp_path, monkeypatch):
    """(name, flags, exact match) -> a run folder as one would be, without the training"""
    monkeypatch.setattr(lab.compare, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)

    def make(name, flags, em, num=500, steps=2):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        config = parse_config(flags.split())
        (folder / "config.json").write_text(json.dumps(asdict(config)))
        times = {f"time_{name}_s": 1.0 for name in LAPS}
        step = times | {"leaves": 9, "loss_tokens": 5, "effective_ratio": 0.5, "mixed_of_8": 0.5,
                        "leaves_per_prompt": 9, "coverage": 0.1}
        (folder / "metrics.jsonl").write_text(json.dumps(step) + "\n")
        row = {"f1": 0.5, "num_questions": num, "by_hops": {}, "by_kind": {}}
        evals = [row | {"step": i, "sampled_tokens": 100 * i, "em": x, "em_first": x}
                 for i, x in enumerate((0.4, em)[:steps])]
        (folder / "evals.jsonl").write_text("\n".join(map(json.dumps, evals)) + "\n")
        return str(folder)
    return make


def test_an_arm_is_what_differs_but_for_the_seed():
    flags = ("--method grpo", "--method grpo --seed 3", "--learning-rate 1e-3 --out x",
             "--learning-rate 1e-3 --pool-size 8")
    names, differing = arms_of([parse_config(words.split()) for words in flags])
    assert names == ["grpo", "grpo", "trace-probe --learning-rate 0.001",
                     "trace-probe --learning-rate 0.001 --pool-size 8"]
    assert set(differing) == {"--method", "--learning-rate", "--pool-size"}
    assert arms_of([Config(), Config(seed=1)]) == (["trace-probe", "trace-probe"], {})


def test_one_seed_is_said_to_prove_nothing_and_many_to_prove_something(made, capsys):
    std, num = spread()
    seeds = {row["seed"] for row in read_rows(RECORDED) if row["arm"] == "grpo"}
    assert 0.01 < std < 0.05 and num == len(seeds) >= 10
    one = made("a", "--method grpo", 0.60), made("b", "", 0.64)
    assert main(one) == 0 and (lab.compare.HERE / "runs" / "compare.png").stat().st_size > 9000
    said = capsys.readouterr().out
    assert "trace-probe − grpo: +4.0" in said and "1 shared seed(s), which may be luck" in said
    assert "| --method | grpo | trace-probe |" in said
    more = [*one]
    for seed in range(1, 6):
        more += made(f"a{seed}", f"--method grpo --seed {seed}", 0.6 + seed / 100), \
            made(f"b{seed}", f"--seed {seed}", 0.64 + seed / 100 + seed % 2 / 1000)
    main(more)
    assert "6 shared seed(s), which is more than luck" in capsys.readouterr().out
    made("scores", "--eval-only", 0.6)  # an evaluation is no training run
    main([])
    listed = capsys.readouterr().out
    assert listed.count("\n") == 12 and "step 1: 64.0 %  python trace_mini.py" in listed


def test_what_does_not_compare_is_said(made, tmp_path, capsys):
    base = made("a", "--method grpo", 0.6)
    for number, (flags, num) in enumerate((("--wiki-seed 1", 500), ("", 100))):
        assert main([base, made(f"b{number}", flags, 0.7, num)]) == 0
        assert "different questions" in capsys.readouterr().out
    assert main([base, made("c", "--seed 2", 0.7)]) == 0
    assert "share no seed" in capsys.readouterr().out
    assert_refused(main, [base, made("d", "--method grpo", 0.7)], "equal seed", capsys)
    assert_refused(main, [base, str(tmp_path)], "no run there", capsys)
    assert_refused(main, [base, made("e", "", 0.7, steps=1)], "after its start", capsys)
    main([base, made("f", "--save-trees 0 --show-tree --seed 7 --method grpo", 0.7)])
    said = capsys.readouterr().out
    assert "| grpo | 2 |" in said and "up to step 1 of 40" in said
    (tmp_path / "runs" / "a" / "metrics.jsonl").write_text("{")
    assert_refused(main, [base], "cannot be read", capsys)
