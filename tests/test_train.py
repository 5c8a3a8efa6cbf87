"""The whole loop, as a user runs it, shrunk: runs, resume, arms, real files, bad input."""
import json
import os

import numpy as np
import pytest
import torch

import trace_mini
from trace_mini import ARMS, draw_pool, main

SMALL = ["--budget", "1200", "--eval-questions", "20", "--pool-size", "12", "--articles", "300",
         "--checkpoint-every", "1"]
METRICS = {"step", "method", "seed", "sampled_tokens", "leaves", "effective_ratio",
           "predicted_effective_ratio", "reward_mean", "loss", "grad_norm", "predictor_brier",
           "predictor_auroc", "cut_observations", "overflowed_episodes", "time_sample_s",
           "time_predict_s", "time_allocate_s", "time_update_s"}


def metrics(folder):
    return [json.loads(line) for line in open(folder / "metrics.jsonl")]


def timeless(row):
    return {k: v for k, v in row.items() if not k.startswith(("time_", "memory_"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "trace"
    assert main(["--steps", "3", "--out", str(folder), *SMALL]) == 0
    return folder


def test_run_folder(finished):
    rows = metrics(finished)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(METRICS <= set(row) for row in rows)
    assert 0 <= rows[-1]["eval_em"] <= rows[-1]["eval_f1"] <= 1
    assert json.loads((finished / "config.json").read_text())["method"] == "trace"
    assert (finished / "curve.png").stat().st_size > 1000
    predictions = json.loads((finished / "predictions.json").read_text())
    assert set(predictions) == {"answer", "sp", "evidence"} and len(predictions["answer"]) == 20
    assert len(list((finished / "checkpoint").glob("*.pt"))) == 2


def test_adapter_loads_with_peft_alone(finished, policy):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    base = AutoModelForCausalLM.from_pretrained(str(trace_mini.HERE / "tiny"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(finished / "adapter"))
    assert any("lora_B" in name and weight.abs().sum() > 0
               for name, weight in model.named_parameters())


def test_resume_gives_the_numbers_of_an_uninterrupted_run(finished, tmp_path):
    folder = tmp_path / "resumed"
    assert main(["--steps", "1", "--out", str(folder), *SMALL]) == 0
    with open(folder / "metrics.jsonl", "a") as stream:  # a step that no checkpoint knows
        stream.write('{"step": 2, "half": tru')
    assert main(["--resume", str(folder), "--steps", "3"]) == 0
    skip = {"eval_em", "eval_f1"}  # the short run also evaluated after its own last step
    rows = [{k: v for k, v in timeless(row).items() if k not in skip} for row in metrics(folder)]
    assert rows == [{k: v for k, v in timeless(row).items() if k not in skip}
                    for row in metrics(finished)]
    assert metrics(folder)[-1]["eval_em"] == metrics(finished)[-1]["eval_em"]


def test_resuming_a_finished_run_says_so(finished, capsys):
    assert main(["--resume", str(finished)]) == 0
    assert "already at its last step" in capsys.readouterr().out
    assert len(metrics(finished)) == 3


@pytest.mark.parametrize("method", ARMS)
def test_every_arm_spends_the_same(method, tmp_path):
    """Cumulative sampled tokens follow one schedule in every arm: what a step overspends or
    leaves over carries to the next, so the gap stays within half a step's (here tiny) budget."""
    folder = tmp_path / method
    assert main(["--method", method, "--steps", "3", "--out", str(folder), *SMALL]) == 0
    rows = metrics(folder)
    assert len(rows) == 3 and rows[-1]["method"] == method
    assert abs(rows[-1]["sampled_tokens"] - 3 * 1200) < 0.5 * 1200
    assert rows[-1]["loss"] is not None and np.isfinite(rows[-1]["grad_norm"])


def test_a_pool_never_holds_a_question_twice(data):
    """Also across epochs: two copies would share their random numbers, token for token."""
    few, cursor, seen = data.train[:10], 0, []
    for _ in range(7):
        pool, cursor = draw_pool(few, 7, cursor, seed=0)
        assert len({q.id for q in pool}) == len(pool) == 7
        seen += pool
    assert {q.id for q in seen} == {q.id for q in few}
    assert len(draw_pool(few, 99, 3, seed=0)[0]) == 10


def random_model(folder, hidden_size=64):
    """A small random Qwen2 with the tiny tokenizer, its head padded as large models' are."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
    tokenizer = AutoTokenizer.from_pretrained(str(trace_mini.HERE / "tiny"))
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer) + 64, hidden_size=hidden_size, intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=0, pad_token_id=0, bos_token_id=0)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["hotpotqa_sample.json", "2wikimultihopqa_sample.json",
                                  "musique_sample.jsonl"])
def test_real_questions(name, shared_data, tmp_path):
    folder = tmp_path / "run"
    assert main(["--data", str(shared_data / name), "--steps", "2", "--budget", "800",
                 "--out", str(folder), "--eval-questions", "8", "--pool-size", "8"]) == 0
    assert len(metrics(folder)) == 2
    assert (folder / ("predictions.jsonl" if "musique" in name else "predictions.json")).exists()


def test_another_architecture_on_real_questions(shared_data, tmp_path):
    model = random_model(tmp_path / "model")
    folder = tmp_path / "run"
    assert main(["--model", model, "--data", str(shared_data / "hotpotqa_sample.json"),
                 "--steps", "1", "--budget", "300", "--max-turns", "2", "--turn-tokens", "12",
                 "--eval-questions", "2", "--pool-size", "2", "--out", str(folder)]) == 0
    assert metrics(folder)[0]["leaves"] > 0


def test_eval_only_scores_the_whole_file(shared_data, tmp_path):
    folder = tmp_path / "run"
    assert main(["--data", str(shared_data / "hotpotqa_sample.json"), "--eval-only",
                 "--out", str(folder)]) == 0
    assert len(json.loads((folder / "predictions.json").read_text())["answer"]) == 100


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, finished):
    (tmp_path / "shape.json").write_text('[{"foo": 1}]')
    (tmp_path / "empty.json").write_text("")
    model = tmp_path / "model"
    random_model(model)
    for file in model.glob("tokenizer*"):
        os.remove(file)
    cases = [(["--no-such-flag"], "no-such-flag"), (["--steps", "many"], "steps"),
             (["--method", "ppo"], "method"), (["--steps", "-1"], "steps"),
             (["--budget", "0"], "budget"), (["--turn-tokens", "-5"], "turn-tokens"),
             (["--eval-questions", "1000000"], "eval-questions"),
             (["--eval-data", "some.json"], "eval-data"),
             (["--advantage", "x"], "advantage"), (["--predictor", "x"], "predictor"),
             (["--data", str(tmp_path / "none.json")], "none.json"),
             (["--data", str(tmp_path / "shape.json")], "shape.json"),
             (["--data", str(tmp_path / "empty.json")], "empty.json"),
             (["--model", str(tmp_path / "nowhere")], "nowhere"),
             (["--model", str(model)], "tokenizer"),
             (["--model", random_model(tmp_path / "odd", hidden_size=96)], "--no-4bit"),
             (["--resume", str(tmp_path)], "config.json"),
             (["--out", str(finished)], "--resume")]
    for arguments, word in cases:
        try:
            code = main([*arguments, *([] if "--out" in arguments or "--resume" in arguments
                                       else ["--out", str(tmp_path / "out")])])
        except SystemExit as stop:  # argparse
            code = stop.code
        error = capsys.readouterr().err.strip()
        assert code == 2 and word in error and "\n" not in error, (arguments, code, error)
    assert not (tmp_path / "out").exists(), "a run that cannot start leaves no folder"
