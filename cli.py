"""The door to farshot: `python cli.py COMMAND ...`.

Commands that need no model answer without importing torch.
"""

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence

from studies.failures import describe_exception, exit_code

COMMANDS = {
    "fit": ("studies.commands.single", "train, from scratch or from weights", "fit --config FILE ..."),
    "validate": ("studies.commands.single", "evaluate the validation images", "validate --run RUN"),
    "test": ("studies.commands.single", "evaluate the test images", "test --run RUN [--data DATA]"),
    "predict": ("studies.commands.predict", "predict files without labels", "predict --run RUN --input FOLDER"),
    "study": ("studies.commands.study", "run or show a whole study", "study run|status|report|query FILE"),
    "list": ("studies.commands.listing", "what there is", "list datasets|models"),
    "prepare": ("studies.commands.prepare", "decode once, write fast shards", "prepare DATA --output DIR"),
    "check": ("studies.commands.check", "decode every image of a data set", "check DATA"),
    "describe": ("studies.commands.describe", "table 1 and the exclusion flow", "describe DATA"),
    "audit": ("studies.commands.audit", "leaks, copies and confounds", "audit DATA [DATA]"),
    "probe": ("studies.commands.probe", "few-shot probes of frozen features", "probe --data DATA --weights W ..."),
    "zero-shot": ("studies.commands.zero_shot", "name classes by their words", "zero-shot --run RUN --data DATA"),
    "similarity": ("studies.commands.similarity", "how alike two networks see images", "similarity A B --data DATA"),
    "rank": ("studies.commands.rank", "which weights to transfer", "rank --data DATA --weights W ..."),
    "weights": ("studies.commands.weights", "published weights, and one's own", "weights list|get|inspect|export"),
}
"""Command → its module, what it does, how it is written."""
USAGE = "usage: python cli.py COMMAND ...\n\n{}\n\nMore: python cli.py COMMAND --help, README.md"


def main(args: Sequence[str] | None = None) -> None:
    """Run one command and exit as DESIGN says: 0 done, 2 bad input, 3 non-finite loss, 130 / 143 interrupted.

    Args:
        args: Words after the program's name; default: the process's own. On success the call returns.
    """
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help"):
        lines = (f"  {name:10} {what:37} {usage}" for name, (_, what, usage) in COMMANDS.items())
        print(USAGE.format("\n".join(lines)))
        return
    if words[0] not in COMMANDS:
        from datamodules.errors import closest

        near = closest(words[0], COMMANDS)
        print(f"error: unknown command {words[0]!r}" + (f"; did you mean {near!r}?" if near else ""), file=sys.stderr)
        print(f"  valid: {', '.join(COMMANDS)}", file=sys.stderr)
        raise SystemExit(2)
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    warnings.formatwarning = _plain_warning
    # OpenMP threads that spin for long take the cores from loader workers and other jobs; docs/performance.md has the
    # figures. It counts only if it is set before torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        importlib.import_module(COMMANDS[words[0]][0]).run(words)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `cli.py list | head` is no error
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        code = exit_code(error)
        if code == 1 and not isinstance(error, SystemExit) and not hasattr(error, "exit_code"):
            traceback.print_exc()  # not foreseen: whoever reports it needs the details
        if code in (130, 143) or not isinstance(error, SystemExit):
            print(describe_exception(error), file=sys.stderr)
        raise SystemExit(code) from error


def _plain_warning(message: Warning | str, *_: object, **__: object) -> str:
    """What a user needs of a warning: its text, not the line of code."""
    return f"warning: {message}\n"


if __name__ == "__main__":
    main()
