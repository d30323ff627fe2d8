"""How a command ends: the exit code of an error, and what a user reads of it. Imports nothing heavy."""

MAX_LINES = 15

#: Errors of Python and Lightning (by name: importing Lightning takes seconds) and their exit codes; ours say their own.
CODES = {"KeyboardInterrupt": 130, "SIGTERMException": 143, "MisconfigurationException": 2}


def clip(text: str) -> str:
    """Cut a message to `MAX_LINES` lines of at most 500 letters, without blank ones."""
    lines = [line[:500] + " ..." * (len(line) > 500) for line in text.splitlines() if line.strip()]
    return "\n".join(lines if len(lines) <= MAX_LINES else [*lines[: MAX_LINES - 1], "..."])


def meaning(error: BaseException | None) -> tuple[BaseException | None, int]:
    """Return the first error with an exit code of its own among an error and what led to it, and the code."""
    while error is not None:
        known = next((CODES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in CODES), 0)
        if code := int(getattr(error, "exit_code", known)):
            return error, code
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None, 1


def exit_code(error: BaseException) -> int:
    """Return 2 for configuration or data, 3 for a non-finite loss, 130 or 143 if interrupted, otherwise 1."""
    own, code = meaning(error)
    if isinstance(error, SystemExit) and own is not error and (own is None or not error.code):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return code


def describe_exception(error: BaseException) -> str:
    """Return the message, of at most `MAX_LINES` lines, for an error that ends the command."""
    own, _ = meaning(error)
    if exit_code(error) in (130, 143):
        return "interrupted: the same command again resumes from the last checkpoint"
    if own is None:
        return clip(f"error: {type(error).__name__}: {error}")
    # A loader's worker hands its error over as a traceback in text, which ends in the message.
    text = str(own)
    if text.startswith("Caught ") and "Original Traceback" in text:
        text = text.rpartition(f"{type(own).__name__}: ")[2]
    return clip(f"error: {text}")
