"""Command lines: flags from the fields of a dataclass, and errors in one line."""
import argparse
import dataclasses
import difflib
import json
import os
import shlex
import sys
from pathlib import Path

from engine.errors import NotFinite, UsageError, first_line
from engine.files import model_folder
from engine.processes import team


class Parser(argparse.ArgumentParser):
    """--help begins with the first line of `description`. A wrong flag is one line, exit code
    2."""

    def __init__(self, description, **options):
        super().__init__(description=description.split("\n")[0], allow_abbrev=False, **options)

    def error(self, message):
        self.exit(2, None if team().rank else f"{self.prog}: {message}\n")

    def parse_args(self, arguments=None):
        found, unknown = self.parse_known_args(arguments)
        if unknown:
            flag = unknown[0].partition("=")[0]
            self.error(f"unknown argument {flag}" + nearest(flag, self._option_string_actions))
        return found


def nearest(word, words):
    """'; did you mean X?' for the word that is most like it, or ''."""
    found = difflib.get_close_matches(word, list(words), 1)
    return f"; did you mean {found[0]}?" if found else ""


def dial(default, group, text, low=0, high=1e12, choices=(), free=False):
    """A field of a dataclass that is a flag: its group in --help, its text, its bounds; `free`
    if it may change when a run goes on."""
    return dataclasses.field(default=default, metadata={
        "group": group, "help": text, "low": low, "high": high, "choices": choices,
        "free": free})


def flag_of(name):
    return "--no-4bit" if name == "four_bit" else "--" + name.replace("_", "-")


def add_dials(parser, config_class):
    """Flags for all dials of a dataclass, in its groups; defaults are shown."""
    groups = {}
    for field in dataclasses.fields(config_class):
        group = field.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        options = {"help": field.metadata["help"], "dest": field.name, "default": field.default}
        if field.type is bool:
            options["action"] = "store_false" if field.default else "store_true"
        else:
            options["type"] = field.type
            options["metavar"] = "{" + ",".join(field.metadata["choices"]) + "}"
            if not field.metadata["choices"]:
                options["metavar"] = field.type.__name__.upper()
            if field.default not in (None, ""):
                options["help"] += " [%(default)s]"
        groups[group].add_argument(flag_of(field.name), **options)


def check_dials(config):
    """UsageError where a dial is out of its bounds or not one of its choices."""
    for field in dataclasses.fields(config):
        value, limits = getattr(config, field.name), field.metadata
        if value is None:
            continue
        if field.type is str:
            value = str(value)  # a number is welcome too
            setattr(config, field.name, value)
        if limits["choices"] and value not in limits["choices"]:
            raise UsageError(f"{flag_of(field.name)} {value}: choose from "
                             f"{', '.join(limits['choices'])}{nearest(value, limits['choices'])}")
        if field.type in (int, float) and not limits["low"] <= value <= limits["high"]:
            raise UsageError(f"{flag_of(field.name)} must be from {limits['low']} to "
                             f"{limits['high']:g}, got {value}")


def own_dials(config):
    """{name: value} of what makes a run and its checkpoints its own."""
    own = [field.name for field in dataclasses.fields(config) if not field.metadata["free"]]
    return {name: getattr(config, name) for name in own if name != "out"}


def changed_dials(config):
    """{flag: value, as text} of what is not at the default of its method."""
    changed, usual = {}, type(config)(method=config.method)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value != getattr(usual, field.name):
            changed[flag_of(field.name)] = "" if field.type is bool else str(value)
    return changed


def command_of(config):
    """The command line that makes such a run, as text, without paths."""
    words = ["python", "trace_mini.py", "--method", config.method]
    for flag, text in changed_dials(config).items():
        if flag not in ("--out", "--resume"):
            words += [flag, without_path(text)]
    return shlex.join(filter(None, words))


def without_path(name):
    """Of a file or folder its name alone: who reads it has it elsewhere."""
    return os.path.basename(name) if os.path.isabs(name) else name


def parse_dials(config_class, description, arguments=None):
    """-> the dataclass. What stands from "Examples:" on in the description ends --help.

    With `--resume DIR` the flags are read twice: the second time the values of that run are their
    defaults, and what would make another run of it is refused. With --eval-only it may score
    other questions (--data, and of the toy wiki --wiki-seed and --hop-mix), into another folder
    (--out)."""
    examples = description[description.index("Examples:"):]
    parser = Parser(description, epilog=examples, formatter_class=argparse.RawTextHelpFormatter)
    add_dials(parser, config_class)
    given = parser.parse_args(arguments)
    if not given.resume:
        return config_class(**absolute(given))
    saved = load_dials(config_class, given.resume)
    parser.set_defaults(**dataclasses.asdict(saved) | {"out": ""})
    given = parser.parse_args(arguments)
    absolute(given)
    others = given.data != saved.data or given.data == "toy" and (
        (given.wiki_seed, given.hop_mix) != (saved.wiki_seed, saved.hop_mix))
    if given.eval_only and others != bool(given.out):
        raise UsageError("--resume --eval-only: other questions (--data, --wiki-seed or --hop-mix) "
                         "and a folder for their scores (--out) go together, neither goes alone")
    if given.eval_only and given.out:
        given.eval_data = ""
        return config_class(**vars(given))
    if given.out == saved.out:
        given.out = ""  # it goes on where it is
    own = {**own_dials(saved), "out": ""}
    for name, value in own.items():
        if getattr(given, name) != value:
            free = map(flag_of, vars(given).keys() - own.keys() - {"resume"})
            raise UsageError(f"--resume {given.resume}: that run has {name} {value}, not "
                             f"{getattr(given, name)}; only {', '.join(sorted(free))} may change, "
                             "and with --eval-only the questions")
    return config_class(**vars(given))


def absolute(given):
    """The dials, with names of files and folders that are there made absolute: a run finds them
    from wherever it goes on."""
    dials = vars(given)
    for name in ("model", "data", "eval_data"):
        value = dials[name]
        if value != "toy" and os.path.exists(value) and model_folder(value) == value:
            dials[name] = os.path.abspath(value)
    return dials


def load_dials(config_class, folder):
    """-> the dataclass of the run in `folder`."""
    file = Path(folder) / "config.json"
    try:
        dials = json.loads(file.read_text())
        for field in dataclasses.fields(config_class):
            value = dials.get(field.name, field.default)
            right = field.type is type(value) or (field.type is float and type(value) is int)
            if not right and value is not field.default:
                raise TypeError(f"{field.name} is {value!r}")
        return config_class(**dials)
    except UsageError:
        raise
    except OSError:
        raise UsageError(f"{folder}: no run there (no config.json)") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{file}: not a configuration of ours ({error})") from None


def run_main(program, work, hint=""):
    """work() -> exit code: its own, or 1 where numbers broke down, 2 for what the user can mend,
    130 for Ctrl-C, 141 where nobody reads what is printed any more (as in `| head`). `hint` says
    how to go on."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # it may have been closed
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character ends nothing
    try:
        code = work() or 0
        team().part_ways()
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains
        return 141
    except KeyboardInterrupt:
        print(f"{program}: stopped at once{hint}", file=sys.stderr)
        return 130
    except UsageError as error:
        if team().rank:
            return 2  # all processes have found it: the first one says so
        code, text = 2, str(error)
    except NotFinite as error:
        code, text = 1, str(error)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's
            raise
        code, text = 2, (f"{first_line(error)} Smaller --micro-batch-tokens, --cache-tokens or "
                         f"--context take less{hint}")
    except OSError as error:  # a full disk, above all
        code, text = 2, first_line(error) + hint
    print(f"{program}: {text}", file=sys.stderr)
    return code
