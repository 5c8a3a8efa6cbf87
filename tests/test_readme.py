"""README, GUIDE, CONTRIBUTING and results/README: what they name exists, what they say is so."""
import dataclasses
import importlib
import json
import re
import shlex
import tokenize

import numpy as np
import pytest

import allocator
from engine.command_line import flag_of
from lab.tables import by_run, end, percent, read_rows, shared, sums
from trace_mini import HERE, Config, main, parse_config

PAGES = {name: (HERE / name).read_text()
         for name in ("README.md", "GUIDE.md", "CONTRIBUTING.md", "results/README.md",
                      "notebooks/TEACHER.md")}
README, GUIDE, EVIDENCE = PAGES["README.md"], PAGES["GUIDE.md"], PAGES["results/README.md"]
COMMANDS = set(re.findall(r"(?:^|`|&& )python (?:-m )?([\w.]+(?: [^`#\n]*)?)",
                          "\n".join(PAGES.values()), re.MULTILINE))


def section(title):
    """The part of the guide under a heading."""
    return GUIDE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_readme_is_one_page():
    assert len(README.split()) <= 1800


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_is_named_is_there(page):
    links = set(re.findall(r"\]\(([\w./-]+)", PAGES[page])) - {"https"}
    assert links
    for link in links:
        assert (HERE / page).parent.joinpath(link).exists(), link
    for name in re.findall(r"`([\w/]+\.(?:py|md))`", PAGES[page]):
        assert (HERE / name).exists(), name


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_parses(command, capsys, monkeypatch):
    program, *words = shlex.split(re.sub(r"\b(mine|NAME)\b", "trace", command))
    module = importlib.import_module(program.removesuffix(".py"))
    if program == "trace_mini.py" and not {"--help", "--resume"} & set(words):
        parse_config(words)
    elif flags := {word for word in words if word.startswith("--")}:
        monkeypatch.setattr("sys.argv", [program, "--help"])
        with pytest.raises(SystemExit):
            module.main()
        assert flags <= set(re.findall(r"--[\w-]+", capsys.readouterr().out))


def test_the_reading_times_are_those_of_the_files():
    """220 code tokens a minute, without comments and docstrings; all within the hour."""
    minutes = {file: int(number) for file, number in
               re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.MULTILINE)}
    assert set(minutes) == {file.name for file in HERE.glob("*.py")}
    assert sum(minutes.values()) <= 60
    for file in minutes:
        with open(HERE / file) as stream:
            tokens = [token for token in tokenize.generate_tokens(stream.readline)
                      if token.string.strip() and not token.string.startswith(("#", '"""'))]
        assert abs(len(tokens) / 220 - minutes[file]) < 1, (file, len(tokens))


# ---------------------------------------------------------------- numbers
SETTINGS = {"first": "", "second": "@second", "hard": "@hard"}


def recorded():
    """{first cell: cells} of the large tables of the evidence: differences, and arms."""
    large = EVIDENCE.split("## Differences")[1].split("## The first protocol")[0]
    lines = [line.strip("| ").split(" | ") for line in large.split("\n") if " ± " in line]
    return {line[0]: line for line in reversed(lines)}  # an arm is in two tables: the first one


def headline():
    """Lines of the README's small table."""
    cells = recorded()
    for setting, at in SETTINGS.items():
        gains = ["{2} ({1})".format(*cells[f"{arm} − grpo, {setting} setting"])
                 for arm in ("trace", "trace-probe")]
        _, num, grpo, *_ = cells[f"grpo{at}"]
        yield f"| {setting} | {grpo} ({num.split()[0]}) | {' | '.join(gains)} |"
    _, num, both, *_ = cells["trace-probe − grpo, three settings together"]
    yield f"| together | | | {both} ({int(num) // 3} in each) |"


def aims():
    """Lines of the table of aims."""
    cells = recorded()
    ends = [cells[f"trace-probe − grpo, {setting} setting"][2] for setting in SETTINGS]
    tokens = [cells[f"trace-probe{at}"][6] for at in SETTINGS.values()]
    _, _, both, p, _ = cells["trace-probe − grpo, three settings together"]
    others = [cells[f"trace-probe − {arm}"][2] for arm in ("pcl", "treepo")]
    yield ("| chosen − grpo at least +2.8 points with an interval above zero, in two of three "
           f"settings | {', '.join(ends)} |")
    yield f"| the three together above zero at 1 % | {both}, p {p if '<' in p else f'= {p}'} |"
    yield f"| GRPO's end after at most 60 % of its tokens | {', '.join(tokens)} |"
    yield f"| not below pcl, nor treepo | {', '.join(others)} |"
    yield ("| Effective Ratio in *hard* at least 0.45 "
           f"| {cells['trace-probe@hard'][7]}; of grpo {cells['grpo@hard'][7]} |")


def bounds():
    """Lines of the table of what bounds the gain."""
    cells, known = recorded(), json.loads((HERE / "results" / "headroom-first.json").read_text())
    yield ("| headroom of stage 1 | mixed groups of the exact optimum / of equal groups (first) | "
           f"{known['roots_2']:.2f} |")
    for suspect, line, setting in (
            ("choice of questions", "active − uniform roots (mean of both prefixes)", "first"),
            ("choice of turns", "active − random prefixes (mean of both roots)", "first"),
            ("prediction", "oracle − trace-probe, hard setting", "hard"),
            ("credit", "merged − probe", "development"),
            ("credit", "fork − probe", "development"),
            ("optimisation", "grpo with twice the steps − grpo", "development"),
            ("optimisation", "probe with twice the steps − probe", "development")):
        words = line.partition(" (")[0].removesuffix(f", {setting} setting")
        yield f"| {suspect} | {words} ({setting}) | {cells[line][2]} points |"


def headroom():
    """Lines of the table of headroom, from results/headroom-NAME.json."""
    for name in (*SETTINGS, "trained"):
        found = json.loads((HERE / "results" / f"headroom-{name}.json").read_text())
        stage_1 = " / ".join(f"{found[f'roots_{number}']:.2f}" for number in (2, 4, 8))
        yield (f"| {name} | {100 * found['dead']:.0f} % | {100 * found['mastered']:.0f} % | "
               f"{found['mixed_of_8']:.2f} | {stage_1} | {found['prefix_flips']:.2f} | "
               f"{found['minutes']:.0f} |")


def speed():
    """Lines of the table of speed, from results/bench.json."""
    for row in json.loads((HERE / "results" / "bench.json").read_text()):
        line, memory = f"| {row['name']} | {row['ours']:.3g} {row['unit']} |", ""
        if row["other"] is None:
            yield f"{line} | | |"
            continue
        low, high = row["spread"]
        if "memory_mb" in row:
            memory = "{:.0f}, {:.0f}".format(*row["memory_mb"])
        yield (f"{line} {row['other']:.3g} {row['unit']} | {row['ratio']:.3g} ({low:.3g} to "
               f"{high:.3g}) | {memory} |")


def predictors():
    """Lines of the table of predictors, from the last step in results/predictor.csv."""
    rows = read_rows(HERE / "results" / "predictor.csv")
    numbers = {}
    for row in rows:
        if row["step"] == rows[-1]["step"] and row["group"] in ("roots", "prefixes"):
            numbers.setdefault(row["predictor"], []).extend(
                f"{row[score]:.2f}" for score in ("brier", "auroc", "bias", "closed"))
    for name, texts in numbers.items():
        yield f"| {name} | {' | '.join(texts)} |"


def course():
    """Lines of the table of their course, from the same file."""
    rows = read_rows(HERE / "results" / "predictor.csv")
    for name in ("head", "probe", "ceiling"):
        cells = [", ".join(f"{row[score]:.2f}" for row in rows
                           if (row["predictor"], row["group"]) == (name, group))
                 for score, group in (("closed", "roots"), ("closed", "prefixes"),
                                      ("bias", "prefixes"))]
        yield f"| {name} | {' | '.join(cells)} |"


@pytest.mark.parametrize("lines, page", [(headline, README), (aims, EVIDENCE), (bounds, EVIDENCE),
                                         (headroom, EVIDENCE), (speed, EVIDENCE),
                                         (predictors, EVIDENCE), (course, EVIDENCE)])
def test_every_measured_number_is_that_of_its_file(lines, page):
    table = "\n".join(lines())
    assert table and f"---|\n{table}\n" in page, table


def test_intervals_in_the_text_are_those_of_tables_and_the_gain_on_cpus_of_its_rows():
    done = by_run(row for row in read_rows(HERE / "results" / "main.csv")
                  if "CPU" in row["hardware"])
    pairs = [shared(done, f"trace-probe{at}", f"grpo{at}") for at in SETTINGS.values()]
    first, second, hard = (percent(sums(groups, [1, -1], end), "+") for groups in pairs)
    assert {len(groups) for groups in pairs} == {17}
    assert f"trace-probe − grpo is {first}, {second} and {hard}." in EVIDENCE
    lines = EVIDENCE.split("\n## The first protocol")[0].split("\n")
    told, tables = (" ".join(line.strip() for line in lines if line.startswith("|") == is_table)
                    for is_table in (False, True))
    signed = re.findall(r"[+-]?\d+\.\d ± \d+\.\d", f"{tables} {first} {second} {hard}")
    assert set(re.findall(r"[+-]?\d+\.\d ± \d+\.\d", told.replace("−", "-"))) <= {
        *signed, *(number.lstrip("+-") for number in signed)}


def test_the_text_says_the_right_lines_of_the_tables():
    cells, told = recorded(), " ".join(EVIDENCE.replace("−", "-").split())
    of = {words.replace("trace-probe − grpo", "gain"): line[2] for words, line in cells.items()
          if len(line) > 2}
    shares = [cells[f"trace-probe{at}"][6].removesuffix(" %") for at in SETTINGS.values()]
    kind, hops = "questions of kind comparison", "questions of 3 hops"
    for words in (
            "{}, {} and {} % of GRPO's tokens".format(*shares),
            f"disagree: {of[f'gain, {hops}']}, {of[f'gain, second setting, {hops}']} and "
            f"{of[f'gain, hard setting, {hops}']}.",
            f"in the first setting ({of[f'gain, {kind}']}) and",
            f"on the third wiki ({of[f'gain on a third wiki, {kind}']}). In the second setting it "
            f"is {of[f'gain, second setting, {kind}']}, in *hard* "
            f"{of[f'gain, hard setting, {kind}']}.",
            f"active roots ({of[f'active − uniform roots, {kind}']}) and not with active prefixes "
            f"({of[f'active − random prefixes, {kind}']})",
            f"with twice the tokens it is {of['probe − grpo, both with twice the steps']}, with "
            f"once, on the same seeds, {of['probe − grpo, both with once, first mix']}; it changes "
            f"by {of['what twice the steps add to probe − grpo']}."):
        assert words in told


def test_the_real_run_is_that_of_its_files():
    lines = (HERE / "results" / "smollm2" / "evals.jsonl").read_text().splitlines()
    first, last = (round(100 * json.loads(lines[i])["em"]) for i in (0, -1))
    for page in (README, GUIDE):
        assert f"from {first} to {last} %" in page


# ---------------------------------------------------------------- the guide
def test_every_dial_is_in_the_guide():
    """With its default. The names that are explained exist; a new one may come without."""
    lines = []
    for dial in dataclasses.fields(Config):
        flag, choices = flag_of(dial.name), dial.metadata["choices"]
        default = "" if dial.type is bool or dial.default is None else dial.default
        lines.append(f"| `{flag}` | {default} | {dial.metadata['help']} |")
        names = section("Dials").split(f"| `{flag}` | ")[-1].split("\n\n")[0]
        assert set(re.findall(r"^\| (\w+) \|", names, re.MULTILINE)) <= set(choices)
    assert re.findall(r"^\| `--.* \|$", section("Dials"), re.MULTILINE)[:len(lines)] == lines


def test_every_metric_of_a_run_is_in_the_guide(tmp_path):
    assert main(["--out", str(tmp_path), *"--steps 1 --budget 300 --eval-questions 4".split()]) == 0
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert set(re.findall(r"`(\w+)`", section("Metrics"))) == set(row)


def test_every_symbol_is_in_its_file():
    rows = re.findall(r"^\|.*\| (.*`.*) \| `([\w/]+\.py)` \|$", section("Symbols"), re.MULTILINE)
    assert rows
    for names, file in rows:
        for name in re.findall(r"`(?:\w+\.)?(\w+)", names):
            assert re.search(rf"\b{name}\b", (HERE / file).read_text()), (name, file)


def test_the_rule_of_ones_own_is_one(monkeypatch):
    monkeypatch.setitem(allocator.ROOT_RULES, "mine", None)  # and takes it out afterwards
    exec(README.split("```python\n")[1].split("```")[0], vars(allocator))
    pool = allocator.Anchors(np.full(3, 0.5), successes=np.array([1, 3, 0]))
    assert allocator.ROOT_RULES["mine"](pool, 8, None).tolist() == [4, 0, 4]


def test_what_the_tiny_policy_leaves_to_learn_is_that_of_its_file():
    found = json.loads((HERE / "results" / "headroom-first.json").read_text())
    dead, mastered, mixed = (f"{100 * found[name]:.0f}"
                             for name in ("dead", "mastered", "mixed_of_8"))
    text = " ".join((HERE / "GUIDE.md").read_text().split())
    assert (f"it never solves {dead} and always solves {mastered}, in {found['rollouts']} rollouts "
            f"each, and {mixed} % of groups of eight") in text
