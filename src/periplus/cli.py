"""The command line: `periplus COMMAND ...`, made from frozen dataclasses by tyro.

Exit codes: 0 done; 2 usage; 3 data; 4 run or checkpoint; 5 non-finite; 130 after SIGINT or SIGTERM. An error is one line on stderr that names the
file, key or value; `--debug` shows the traceback instead. `--json` puts one JSON document on stdout and nothing else there.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from periplus.errors import PeriplusError, UsageError

DESCRIPTION = "Deep generative models of small images: trained, measured, located and priced, every figure with what bounds it."
#: What tyro says of a word that is no number, be the option optional or not.
NOT_A_NUMBER = re.compile(
    r"parsing (?P<option>--[\w-]+): .*?(?:invalid literal for int\(\) with base 10|(?P<float>could not convert string to float)): "
    r"'(?P<value>[^'\n]*)'",
    re.DOTALL,
)


@dataclass(frozen=True)
class Command:
    """A word of the command line: what it is for, and a function from the words after it to its (parsed) options."""

    summary: str
    options: Callable[[Sequence[str]], Any]
    subcommands: tuple[str, ...] = ()


def commands() -> dict[str, Command]:
    """All commands, in the order of `periplus --help`. Imports what parsing needs; heavy rooms are opened by the command itself."""
    from periplus import commands as rooms
    from periplus.bench_command import bench_options
    from periplus.compare_command import Compare
    from periplus.config import MODELS
    from periplus.explorer.command import Explore
    from periplus.latent_commands import FindPath, Invert
    from periplus.sweep_command import sweep_options

    return {
        "study": Command("the whole course sheet: train, measure, report.pdf, report.html, results.json", lambda argv: rooms.Study),
        "train": Command("train one model into a run folder", rooms.train_options, tuple(MODELS)),
        "sweep": Command("a grid of settings times seeds: rate-distortion curve, table, CSV", sweep_options, tuple(MODELS)),
        "sample": Command("images from a run: a PNG grid, or an .npz", lambda argv: rooms.Sample),
        "evaluate": Command("every measure that fits a run, with its bounds: evaluation.json", lambda argv: rooms.Evaluate),
        "compare": Command("runs side by side: scores with floors and intervals, verdicts, grids, curves", lambda argv: Compare),
        "invert": Command("codes of images: errors, certificates, distinct minima", lambda argv: Invert),
        "path": Command("least-cost paths between images: cost, bounds, morph strip", lambda argv: FindPath),
        "explore": Command("a page in the browser to move in a latent space, or one file of it", lambda argv: Explore),
        "report": Command("report.pdf and report.html of one or more runs", lambda argv: rooms.Report),
        "bench": Command("training steps timed against other loops, in turn", bench_options, ("train",)),
        "data": Command("data sets: list, fetch, verify", rooms.data_options, ("list", "fetch", "verify")),
        "doctor": Command("the environment: versions, devices, data sets", lambda argv: rooms.Doctor),
    }


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit. With no arguments, the arguments of the process."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _one_line_warning
            run(words)
    except PeriplusError as error:
        if debug:
            raise
        fail(str(error), error.exit_code)
    except KeyboardInterrupt as interruption:
        fail(str(interruption) or "interrupted", 130)
    except BrokenPipeError:  # the reader of our output has gone: not our error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if debug:
            raise
        fail(f"{error.filename or 'a file'}: {error.strerror or error}: check the path, its permissions and the disk", 2)
    except MemoryError:
        fail("out of memory: use fewer images, a smaller --batch-size or a smaller --n", 1)
    except Exception as error:
        if debug:
            raise
        fail(f"unexpected {type(error).__name__}: {error} (run again with --debug for the traceback, and please report it)", 1)
    sys.exit(0)


def _one_line_warning(message: Warning | str, *where: object, **more: object) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt(f"stopped by {signal.Signals(number).name}")


def fail(message: str, code: int) -> NoReturn:
    """One unwrapped line on stderr, and the exit code."""
    print(f"periplus: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def run(words: list[str]) -> None:
    """Find the command, parse its options, carry it out."""
    if not words or words[0] in ("-h", "--help"):
        print_help()
        return
    if words[0] == "--version":
        from periplus import __version__

        print(f"periplus {__version__}")
        return
    name, rest = words[0], words[1:]
    known = commands()
    if name not in known:
        from periplus.config import nearest

        raise UsageError(f"unknown command '{name}'{nearest(name, known)}: known are {', '.join(known)}")
    command = known[name]
    program = f"periplus {name}"
    if command.subcommands:
        if not rest or rest[0].startswith("-"):
            if rest and rest[0] in ("-h", "--help"):
                print_subcommands(program, command)
                return
            raise UsageError(f"{program} needs one of {', '.join(command.subcommands)} first; '{program} --help' tells more")
        program += f" {rest[0]}"
    options = parse(command.options(rest), rest[1:] if command.subcommands else rest, program)
    options.run()


def parse(options: Any, words: Sequence[str], program: str) -> Any:
    """An instance of the options' dataclass from the words. Raises UsageError with tyro's complaint in one line."""
    import tyro

    complaint = io.StringIO()
    width = os.environ.get("COLUMNS")
    wants_help = any(word in ("-h", "--help") for word in words)
    if not wants_help:
        os.environ["COLUMNS"] = "10000"  # one line, not a box
    try:
        with contextlib.nullcontext() if wants_help else contextlib.redirect_stderr(complaint):
            return tyro.cli(options, args=list(words), prog=program, config=(tyro.conf.FlagCreatePairsOff,))
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(one_line(complaint.getvalue(), program)) from None
    finally:
        if not wants_help:
            os.environ.pop("COLUMNS") if width is None else os.environ.update(COLUMNS=width)


def one_line(box: str, program: str) -> str:
    """tyro's boxed complaint as one line, without frames, escape codes and its pointer to the help."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    if number := NOT_A_NUMBER.search(text):
        kind = "a number" if number["float"] else "a whole number"
        return f"{number['option']} is '{number['value']}': {kind} is needed; '{program} --help' tells more"
    lines = [re.sub(r"^[│|]\s*|\s*[│|]$", "", line).strip() for line in text.splitlines()]
    kept = [line for line in lines if line and not re.match(r"[╭╰─]|-+$", line) and not line.startswith(("For full helptext", "Argument helptext"))]
    return f"{'; '.join(kept).replace(':;', ':')}; '{program} --help' tells more"


def print_help() -> None:
    """What `periplus --help` says."""
    print(f"usage: periplus COMMAND [OPTIONS]\n\n{DESCRIPTION}\n\ncommands:")
    for name, command in commands().items():
        words = f"{name} {{{','.join(command.subcommands)}}}" if command.subcommands else name
        print(f"  {words:<26} {command.summary}")
    print(
        "\n'periplus COMMAND --help' tells a command's options. Every command takes --json (one JSON document on stdout) and --debug (tracebacks)."
        "\nExit codes: 0 done, 2 usage, 3 data, 4 run or checkpoint, 5 non-finite, 130 interrupted."
    )


def print_subcommands(program: str, command: Command) -> None:
    """What `periplus train --help` says: the models, and where their options are."""
    print(f"usage: {program} {{{','.join(command.subcommands)}}} [OPTIONS]\n\n{command.summary}\n")
    for word in command.subcommands:
        print(f"  '{program} {word} --help' tells the options of {word}")
