"""Readable errors of the command line: what was wrong, in which file and line, what is valid, what was meant.

jsonargparse reports a mistake as nested prose below a usage dump. `ReadableParser` keeps its checks and
explains its messages by the table `RULES`; a message that no rule knows is shown as it is. So a new release
of jsonargparse can make messages plainer but never break a run.
"""

import argparse
import collections.abc
import inspect
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import yaml
from pytorch_lightning.cli import LightningArgumentParser

from datamodules.errors import DataError, closest, shorten
from studies.failures import clip, meaning
from studies.given import SUFFIXES, Given, Key, options, to_key

Answer = tuple[str, str, Sequence[object], str]  # what is wrong, where, what is valid, the next step


def _alternatives(typehint: Any) -> list[Any]:
    """Return what a type accepts: values of literals, "null", types; for a callable what it returns."""
    if typehint in (None, type(None)):
        return ["null"]
    if get_origin(typehint) is Literal:
        return list(get_args(typehint))
    if get_origin(typehint) is collections.abc.Callable:
        return _alternatives(get_args(typehint)[-1])
    if get_origin(typehint) in (Union, UnionType):
        return list(dict.fromkeys(one for part in get_args(typehint) for one in _alternatives(part)))
    return ["true", "false"] if typehint is bool else [typehint]


def _class_names(typehint: Any) -> list[str]:
    """Return the short names of the public subclasses whose instances or factories a type accepts."""
    found = _alternatives(typehint)
    found += [item for one in found for item in get_args(one)]  # list[Callback]
    classes = [one for one in found if inspect.isclass(one) and one.__module__ != "builtins"]
    for one in classes:  # grows while it is read
        classes += type.__subclasses__(one)
    concrete = [one for one in classes if one not in found and not inspect.isabstract(one)]
    return sorted({one.__name__ for one in concrete if not re.search(r"^_|<locals>|\._", one.__qualname__)})


def _texts(alternatives: Iterable[Any]) -> list[str]:
    return list(dict.fromkeys(one.__name__ if inspect.isclass(one) else str(one) for one in alternatives))


def _meant(value: str, candidates: Iterable[object]) -> str:
    nearest = closest(value, candidates)
    return f"; did you mean {nearest}?" if nearest else ""


class Mistake:
    """One error of a parser, what is needed to explain it, and an explanation for each kind of mistake."""

    def __init__(self, parser: "ReadableParser", message: str, error: BaseException | None = None) -> None:
        top: Any = getattr(parser, "parent_parser", parser)
        self.given = Given(top.given)
        menus = [action for action in top._actions if isinstance(action, argparse._SubParsersAction)]
        self.commands: dict[str, Any] = dict(menus[0].choices) if menus else {}
        self.command = next((arg for arg in self.given.args if arg in self.commands), "")
        self.call = f"python {top.prog}" if top.prog.endswith(".py") else top.prog
        self.root = self.parser = self.commands.get(self.command, parser)
        self.key: Key = ()
        self.report = self.message = message
        texts = [message]
        while error is not None:  # afterwards .parser is the innermost one, .report is about its .key
            texts.append(str(error))
            self.parser = getattr(error, "parser", self.parser)
            header = re.match(r'Parser key "([^"]+)"', texts[-1])
            if header and isinstance(error, TypeError) and self.key[-1:] != to_key(header[1])[-1:]:
                self.key, self.report = self.key + to_key(header[1]), texts[-1]
            error = error.__cause__
        self.key = self.key[self.key[:1] == (self.command,) :]
        self.leaf, self.parent = texts[-1], texts[-2] if len(texts) > 1 else ""

    @property
    def typehint(self) -> Any:
        """The type of the innermost key."""
        types = {to_key(one.dest): getattr(one, "_typehint", None) for one in self.parser._actions}
        ends = [self.key[start:] for start in range(len(self.key)) if self.key[start:] in types]
        return types[ends[0]] if ends else None

    @property
    def help(self) -> str:
        """The command that explains what the innermost key accepts."""
        entry = self.given.find((*self.key[:1], "class_path")) or self.given.find(self.key[:1])
        option = "--help"
        if entry and self.key[0] in ("data", "model") and entry.value.isidentifier():
            option = f"--{self.key[0]}.help {entry.value}"
            if len(self.key) > 1 and self.parser.owner not in ("", entry.value):  # a class inside the class
                inner = f"--{'.init_args.'.join(self.key[:2])}.help {self.parser.owner}"
                option = f"--{self.key[0]} {entry.value} {inner}"
        return f"{self.call} {self.command or 'fit'} {option}"

    def names(self, prefix: Key = ()) -> list[str]:
        """Return the names that may follow a prefix in the innermost parser."""
        dests = [tuple(action.dest.split(".")) for action in self.parser._actions]
        found = {dest[len(prefix)] for dest in dests if dest[: len(prefix)] == prefix != dest}
        links = {one[-1] for one in self.root.links if one[:-1] == self.key + prefix}
        return sorted(found - links - {"help", "print_config", argparse.SUPPRESS})

    def where(self, key: Key, value: str | None = None) -> str:
        """Say where the user wrote a key, or else its nearest parent."""
        found = (self.given.find(key[:size], value) for size in range(len(key), 0, -1))
        return next((str(entry) for entry in found if entry), ".".join(key) or "command line")

    def _unknown_key(self, key: str) -> Answer:
        if entry := self.given.beside_class_path(self.key):
            name = entry.dotted.rpartition(".")[2]
            problem = f"{name} cannot stand beside class_path{_meant(name, ['class_path', 'init_args'])}"
            hint = f"indent the settings of a class below init_args: ({self.help} lists them)"
            return problem, str(entry), ["class_path", "init_args"], hint
        rest = to_key(key)
        known = next((n for n, name in enumerate(rest) if name not in self.names(rest[:n])), len(rest) - 1)
        owner = self.parser.owner or ".".join(rest[:known]) or f"the command {self.command}"
        valid = self.names(rest[:known])
        problem = f"{owner} has no setting {rest[known]}{_meant(rest[known], valid)}"
        return problem, self.where(self.key + rest[: known + 1]), valid, f"{self.help} explains them"

    def _wrong_value(self) -> Answer | None:
        found = re.search(r"(?:Got|Given) value: (.*)", self.report)
        if not self.key or self.typehint is None or not found:
            return None
        value, valid = textwrap.shorten(found[1], 80), _alternatives(self.typehint)
        near = [*(one for one in valid if isinstance(one, str)), *_class_names(self.typehint)]
        problem = f"{value} is not a valid value of {self.key[-1]}{_meant(value, near)}"
        return problem, self.where(self.key, value), _texts(valid), f"{self.help} explains {self.key[-1]}"

    def _unknown_class(self, name: str = "", reason: str = "") -> Answer | None:
        if option := re.match(r"--(\S+)\.help: ", self.message):
            self.key = to_key(option[1])
        named = re.search(r"class_path[= ]'([^']+)'", self.parent)
        name, valid = name or (named[1] if named else ""), _class_names(self.typehint)
        if not name or any(one in (int, float, str) for one in _alternatives(self.typehint)):
            return None  # a wrong value of a plain type, which was also tried as a class
        if Path(name).suffix in SUFFIXES:
            return self._missing_file(name)
        problem = f"{name} is not a class for {'.'.join(self.key)}{_meant(name.rpartition('.')[2], valid)}"
        where = self.where((*self.key, "help") if option else self.key, name)
        where += f" ({reason})" if reason else ""
        return problem, where, valid, "name one of these, or the full path of a class that Python can import"

    def _missing_file(self, name: str) -> Answer:
        typed = [one for one in self.given.configs if Path(one).absolute() == Path(name)]
        entry, name = None if typed else self.given.find(self.key, name), (typed or [name])[0]
        path = (entry.file.parent if entry and entry.file else Path()) / name
        folder = path if path.is_dir() else next(parent for parent in path.parents if parent.is_dir())
        valid = sorted(str(one) for one in folder.glob("*") if one.is_dir() or one.suffix in SUFFIXES)
        files = {Path(one).name: one for one in [*map(str, Path("configs").rglob("*.yaml")), *valid]}
        nearest = closest(path.name, files)
        problem = f"{name} is a folder" if path.is_dir() else f"there is no file {name}"
        problem += f"; did you mean {files[nearest]}?" if nearest else ""
        hint = "give the path of a YAML file; a path inside a config file is relative to that file"
        return problem, str(entry or f"command line, --config {name}"), valid, hint

    def _bad_config(self) -> Answer:
        for file, error in self.given.broken:
            mark = getattr(error, "problem_mark", None)
            where = f"{file}, line {mark.line + 1}, column {mark.column + 1}" if mark else str(file)
            problem = getattr(error, "problem", None) or getattr(error, "reason", error)
            hint = "check indentation (spaces, no tabs), brackets, quotes and colons there and one line above"
            return f"{file} is not valid YAML: {problem}", where, (), hint
        where = ", ".join(self.given.empty) or "command line, --config"
        return "a config file holds no settings", where, self.names(), "write settings as KEY: VALUE"

    def _missing_key(self, required: str) -> Answer:
        keys = [to_key(dotted.removeprefix(f"{self.command}.")) for dotted in required.split(", ")]
        names = [".".join(self.key + key) for key in keys]
        self.key += keys[0]
        where = self.where(self.key) if self.given.find(self.key[:1]) else ", ".join(self.given.configs)
        valid = _class_names(self.typehint) or _texts(_alternatives(self.typehint))
        hint = f"set {names[0]} in a config (--config FILE) or by --{names[0]} VALUE; see {self.help}"
        return f"{' and '.join(names)} must be given", where or "command line", valid, hint

    def _unknown_option(self, option: str) -> Answer | None:
        if self.key:
            return None
        if Path(option).suffix in SUFFIXES and not option.startswith("-"):
            return f"{option} needs an option; did you mean --config {option}?", "command line", (), self.help
        keys = [action.dest for action in self.root._actions if not action.dest.endswith("help")]
        leaves = {f"--{key.rpartition('.')[2]}": f"--{key}" for key in keys}
        nearest = leaves.get(option) or closest(option, leaves.values())
        problem = f"there is no option {option}" + (f"; did you mean {nearest}?" if nearest else "")
        hint = f"{self.help}; settings of a class are --data.NAME and --model.NAME"
        return problem, f"command line, {option}", [f"--{name}" for name in self.names()], hint

    def _no_value(self, option: str) -> Answer:
        bare = (one for one, value in options(self.given.args) if not value and one.startswith(option))
        option = next(bare, option)
        return f"{option} needs a value", f"command line, {option}", (), f"{option} VALUE; see {self.help}"

    def _unknown_command(self, name: str = "") -> Answer:
        commands = [*self.commands, *ReadableParser.other_commands]
        problem = f"there is no command {name}{_meant(name, commands)}" if name else "no command is given"
        return problem, "command line, first word", commands, f"{self.call} {commands[0]} --config FILE"

    def ignored(self, config: Any) -> Answer | None:
        """What was parsed, but LightningCLI would ignore it or fail on it later."""
        if hasattr(config.get("trainer", config), "__dict__"):
            return None
        hint = "indent settings below it, or remove it"
        return "trainer holds no settings", self.where(("trainer",)), self.names(("trainer",)), hint


# What jsonargparse 4.53 says -> who explains it, given the named groups; None leaves it to the next rule.
RULES: tuple[tuple[str, Callable[..., Answer | None]], ...] = (
    (r"(?:does not exist|is not a file|is not readable): '(?P<name>.+)'", Mistake._missing_file),
    (r'Unable to load config "(?P<name>.+)"', Mistake._missing_file),
    (r"Problems parsing|Unexpected config|, column \d|can't decode|unacceptable char", Mistake._bad_config),
    (r"(?:Option|accept option) '(?P<key>[^']+)'(?: is not accepted)?$", Mistake._unknown_key),
    (r"Not a valid subclass of .*?\{'(?P<key>\w+)'", Mistake._unknown_key),
    (r"arguments are required: (?P<required>.+)", Mistake._missing_key),
    (r"Expected a dot import path string: (?P<name>\S+)", Mistake._unknown_class),
    (r"Import path (?P<name>\S+) (?P<reason>does not .*)", Mistake._unknown_class),
    (r"Expected '(?P<name>\S+)' (?P<reason>to be a .*)", Mistake._unknown_class),
    (r"(?P<reason>No module named .*|.*has no attribute .*)", Mistake._unknown_class),
    (r"unrecognized arguments: (?P<option>[^\s=]+)", Mistake._unknown_option),
    (r"argument (?:-c/)?(?P<option>\S+): expected one argument", Mistake._no_value),
    (r"argument subcommand: invalid choice: '(?P<name>[^']*)'", Mistake._unknown_command),
    (r'expected "subcommand" to be one of', Mistake._unknown_command),
    (r"", Mistake._wrong_value),
)


def _show(answer: Answer) -> str:
    problem, where, valid, hint = answer
    return str(DataError(problem, where=where, valid=shorten(valid, 30) if valid else None, hint=hint))


def _explain(parser: "ReadableParser", message: str, error: BaseException | None) -> str:
    for pattern, rule in RULES:
        mistake = Mistake(parser, message, error)
        match = re.search(pattern, mistake.leaf)
        if match and (answer := rule(mistake, **match.groupdict())):
            return _show(answer)
    return message


class ReadableParser(LightningArgumentParser):
    """A LightningCLI parser whose errors are short, name file and line, and end the command with exit code 2.

    It also refuses what LightningCLI ignores: abbreviated options, keys that a link sets, and a `trainer:`
    that is no mapping. JSONARGPARSE_DEBUG=1 brings the tracebacks back.
    """

    other_commands: tuple[str, ...] = ()  # commands that are answered before this parser is built

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.given: Sequence[str] = ()
        self.links: dict[Key, str] = {}
        self.owner = ""  # the class whose arguments this parser reads

    def add_class_arguments(self, theclass: type, *args: Any, **kwargs: Any) -> Any:
        """Add the arguments of a class; without a nested key the parser is that of the class."""
        if not args and "nested_key" not in kwargs:
            self.owner = theclass.__name__
        return super().add_class_arguments(theclass, *args, **kwargs)

    def link_arguments(self, source: str | tuple[str, ...], target: str, *args: Any, **kwargs: Any) -> Any:
        """Derive one argument from others, which the user may then not set."""
        self.links[to_key(target)] = source if isinstance(source, str) else ", ".join(source)
        return super().link_arguments(source, target, *args, **kwargs)

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **kwargs: Any) -> Any:
        """Parse a command line, and refuse what LightningCLI would silently ignore."""
        self.given = sys.argv[1:] if args is None else list(args)
        if not self.exit_on_error or hasattr(self, "parent_parser"):
            return super().parse_args(args, *more, **kwargs)
        try:
            config = super().parse_args(args, *more, **kwargs)
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            self.error(str(error), error)
        mistake = Mistake(self, "")
        if answer := mistake.ignored(config.get(mistake.command, config)):
            self._quit(_show(answer))
        return config

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print an explanation on stderr and exit with code 2; the parser of a nested class raises."""
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:
            try:
                super().error(message, ex)
            except argparse.ArgumentError as error:
                error.parser = self  # type: ignore[attr-defined]
                raise
        with suppress(Exception):  # an error in an explanation must not hide the message
            message = str(meaning(ex)[0] or _explain(self, message, ex))
        self._quit(message)

    def _quit(self, text: str) -> NoReturn:
        sys.stderr.write(clip(f"error: {text}") + "\n")
        stop = SystemExit(2)
        stop.add_note(text)  # for a study, which runs many command lines and reports why one of them stopped
        raise stop


def whole_numbers_first(parser: argparse.ArgumentParser) -> None:
    """Read 1 as one batch and not as the share 1.0, which is all of them, where an argument takes int or float.

    `typing` keeps one union of both orders, the first that anything imported has written down, and the parser tries the
    types in that order.
    """
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint == int | float | None:
            action._typehint = int | float | None  # type: ignore[attr-defined]
        elif hint == int | float:
            action._typehint = int | float  # type: ignore[attr-defined]
