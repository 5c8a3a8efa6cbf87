"""What outsiders ran into elsewhere: questions, models and tokenizers as people have them."""
import json
import shutil

import pytest
import torch
from conftest import assert_refused, make_model
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

from engine.errors import UsageError
from engine.loading import check_logits, steady_context
from engine.runs import check_inputs
from policy import load_policy
from react_env import Question, ReActEnv, Wiki, parse_action, split_completion
from trace_mini import Config, main
from world.files import load_questions
from world.questions import load_data


@pytest.fixture
def faults(shared_data):
    return shared_data.parent / "faults"


def run(*flags):
    return main(["--method=grpo", "--budget=300", "--eval-questions=5", *flags])


def of_model(folder, kind="llama", change=lambda tokenizer: None, **shape):
    """Policy of a small random model, whose tokenizer was changed after it was made."""
    make_model(folder, kind, **shape)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    change(tokenizer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token,
        chat_template=tokenizer.chat_template).save_pretrained(folder)
    return load_policy(Config(model=str(folder), four_bit=False, turn_tokens=8))


# ---------------------------------------------------------------- models
def test_a_context_ends_where_the_encoding_of_positions_changes(tmp_path):
    """longrope: log-probs depended on how long the neighbours in a batch were."""
    longrope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [8.0] * 8,
                "rope_theta": 1e4}
    policy = of_model(tmp_path / "long", "phi3", rope_parameters=longrope,
                      original_max_position_embeddings=128, max_position_embeddings=1024)
    assert policy.context <= 128 and "encoding of positions" in policy.notice
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4,
            "original_max_position_embeddings": 128}
    policy = of_model(tmp_path / "yarn", rope_parameters=yarn, max_position_embeddings=512)
    assert policy.context == 512 and "positions" not in policy.notice
    assert load_policy(Config(context=41, turn_tokens=8)).context == 41


def test_more_tokens_may_be_rounded_otherwise():
    """On an H200, bitsandbytes has a kernel for up to 32 tokens and another above. The context of a
    real model was halved down to 6; and its logits may be those of both kernels."""
    policy = load_policy(Config())

    def rounded(module, inputs, output):
        if output.last_hidden_state.shape[1] > 32:
            output.last_hidden_state = 1.5 * output.last_hidden_state
        return output
    policy.body.register_forward_hook(rounded)
    assert steady_context(policy, policy.context) == policy.context
    check_logits(policy)


@pytest.mark.parametrize("kind, why", [
    ("falcon", "attention"), ("gpt_neo", "attention"), ("bloom", "attention"), ("mpt", "attention"),
    ("gemma3", "more than text")])
def test_why_a_model_cannot_be_used_is_said_in_words(tmp_path, kind, why):
    make_model(tmp_path, "llama")
    AutoConfig.for_model(kind, hidden_size=64, num_attention_heads=4).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=why) as error:
        load_policy(Config(model=str(tmp_path), four_bit=True))
    assert "no-4bit" not in str(error.value)


def test_a_tokenizer_must_fit_the_weights(tmp_path, capsys):
    model, out = make_model(tmp_path / "m", "llama", vocab_size=300), tmp_path / "run"
    assert_refused(main, [f"--model={model}", f"--out={out}"], "do not belong together", capsys)
    assert not out.exists()


def test_holes_in_a_vocabulary_are_never_sampled(tmp_path):
    """Ids that no text stands for, between others."""
    def change(tokenizer):
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state["model"]["vocab"]["hole-behind"] = len(tokenizer) + 5
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    policy = of_model(tmp_path, change=change)
    logprobs = policy.logits(torch.randn(1, 64)).log_softmax(-1)[0]
    hole = policy.num_words - 3
    assert hole in policy.holes and logprobs[hole] == -torch.inf
    assert torch.isfinite(logprobs[policy.num_words - 1])


def test_files_that_are_quantised_already_are_said_to_be(tmp_path):
    model = make_model(tmp_path)
    AutoModelForCausalLM.from_pretrained(
        model, quantization_config=BitsAndBytesConfig(load_in_4bit=True)).save_pretrained(model)
    assert "quantised already" in load_policy(Config(model=model, four_bit=False)).notice


# ---------------------------------------------------------------- text
def test_no_added_token_comes_out_of_data(tmp_path):
    """Special or not: a flag of the tokenizer does not say what a token does. Nor is text cut
    where a tokenizer was saved with a length."""
    def change(tokenizer):
        tokenizer.add_tokens(["<tool_call>", "<think>"])
        tokenizer.backend_tokenizer.enable_truncation(8)
    policy = of_model(tmp_path, change=change)
    text = "Is <tool_call> a tag? <think> or </s> or <|eot_id|>"
    ids = policy.encode(text)
    assert not set(ids) & set(policy.tokenizer.added_tokens_decoder)
    assert policy.text(ids) == text


@pytest.mark.parametrize("before", ["first", "always", "prepend", "prefix_space"])
def test_pieces_of_a_transcript_join_as_they_are_written(tmp_path, before):
    """Some tokenizers put a space before every text that they are given."""
    def change(tokenizer):
        inside = tokenizer._tokenizer
        if before == "prepend":
            inside.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), inside.normalizer])
        elif before == "prefix_space":
            inside.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        else:
            inside.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=before, split=False)
    policy = of_model(tmp_path, "llama" if before == "prefix_space" else "gemma2", change)
    pieces = ["x", "\nThought:", " I look.\nAction: Search[A]", "\nObservation: B."]
    assert policy.text(sum(map(policy.encode, pieces), [])) == "".join(pieces)


def test_a_tokenizer_that_changes_text_is_refused(tmp_path):
    def lower(tokenizer):
        tokenizer._tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UsageError, match="does not keep text"):
        of_model(tmp_path, change=lower)


def test_a_prompt_is_the_same_on_every_day(tmp_path):
    """And a resumed run keeps its own."""
    def dated(tokenizer):
        tokenizer.chat_template = ("Today is {{ strftime_now('%d %B %Y, %H:%M') }}. "
                                   + tokenizer.chat_template)
    policy = of_model(tmp_path, change=dated)
    assert "26 Jul 2024" in policy.text(policy.before)
    saved, before = policy.state_dict(), policy.before
    policy.before = [1, 2, 3]
    policy.load_state_dict(saved)
    assert policy.before == before


def test_a_tag_that_the_template_leaves_open_is_told(tmp_path):
    def thinks(tokenizer):
        tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    assert "<think> open" in of_model(tmp_path, change=thinks).notice


@pytest.mark.parametrize("text", [
    "I look.\n**Action:** Search[A]", "I look.\nAction : Search[A]",
    "I look.\n- ACTION 2: Search[A]", "I look.\n__Action__: `Search[A]`",
    "I look.\n1. Action: **SEARCH** [A]", "I look.\nAction:\n```\nSearch[A]\n```"])
def test_the_marker_of_an_action_is_read_as_by_a_reader(text):
    thought, action = split_completion(text)
    assert thought == "I look." and parse_action(action) == ("search", "A")


# ---------------------------------------------------------------- questions
def test_an_answer_that_is_nothing_earns_nothing():
    question = Question("1", "Which?", ("the",), "bridge", 2)
    env = ReActEnv(Wiki([]))
    assert env.step(env.reset(question), "Finish[]").reward == 0
    assert question.score("")["em"] == 1  # the official score stays


@pytest.mark.parametrize("file, said", [
    ("one-overlong.json", "1 questions are too long"),
    ("musique-full.jsonl", "20 questions of"),
    ("hub-hotpot.json", ""), ("hub-2wiki.jsonl", "")])
def test_records_that_cannot_be_used_end_no_run(faults, tmp_path, capsys, file, said):
    assert run(f"--data={faults}/{file}", "--steps=1", f"--out={tmp_path}") == 0
    out = capsys.readouterr().out
    assert said in out and "knows the toy wiki only" in out and "questions after" in out


def test_a_file_without_any_answer_is_one_line(faults, tmp_path, capsys):
    assert_refused(main, [f"--data={faults}/empty-answer.json", f"--out={tmp_path}"],
                   "no question that has an answer", capsys)


def test_a_test_split_gets_predictions_without_scores(faults, tmp_path, capsys):
    assert main([f"--data={faults}/hotpot-test.json", "--eval-only", f"--out={tmp_path}"]) == 0
    assert "without scores" in capsys.readouterr().out
    assert json.loads((tmp_path / "predictions.json").read_text())["answer"]["t0"] is not None


def test_columns_are_read_as_rows(tmp_path):
    """MuSiQue as the datasets library writes it: paragraphs by column."""
    record = {"id": "2hop__1", "question": "Who?", "answer": "Ana", "paragraphs": {
        "title": ["Ost"], "paragraph_text": ["Ana founded Ost."], "is_supporting": [True]}}
    (tmp_path / "m.jsonl").write_text(json.dumps(record))
    [question], wiki = load_questions(tmp_path / "m.jsonl")
    assert question.gold_titles == ("Ost",) and wiki.text("Ost") == "Ana founded Ost."
    record = {"id": "1", "question": "Who?", "evidences": "", "context": [{
        "sentences": ["Ana founded Ost."], "title": "Ost"}]}
    (tmp_path / "w.jsonl").write_text(json.dumps(record))
    assert load_questions(tmp_path / "w.jsonl")[1].text("Ost") == "Ana founded Ost."


def test_inputs_are_known_by_content(faults, tmp_path, capsys, monkeypatch):
    """A data file was replaced by another; or the run goes on in another folder."""
    file, config = tmp_path / "mine.json", tmp_path / "run" / "config.json"
    shutil.copy(faults / "hub-hotpot.json", file)
    monkeypatch.chdir(tmp_path)
    assert run("--data=mine.json", "--steps=1", "--out=run") == 0
    monkeypatch.chdir("/")
    resume = [f"--resume={config.parent}", "--steps=3"]
    assert main([*resume, "--steps=2"]) == 0
    capsys.readouterr()
    shutil.copy(faults / "one-overlong.json", file)
    assert_refused(main, resume, "questions: not what the run began with", capsys)
    config.write_text(config.read_text().replace('"budget": 300', '"budget": 400'))
    assert_refused(main, resume, "put 300 back", capsys)
    config.write_text(config.read_text().replace('"budget": 400,', ""))
    assert_refused(main, resume, "put 300 back", capsys)


def test_a_run_on_another_mix_scores_a_file(faults):
    config = Config(data=f"{faults}/hub-hotpot.json", hop_mix="0,100", eval_only=True, out="x")
    with pytest.raises(UsageError, match="--hop-mix"):
        load_data(config)
    config.resume = "a run on that mix"
    assert len(load_data(config).eval) == 20


def test_weights_that_changed_are_refused(tmp_path):
    with pytest.raises(UsageError, match="weights: not what the run began with"):
        check_inputs(tmp_path, {"inputs": {"weights": "2"}}, {"weights": "1"})
