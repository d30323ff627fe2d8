"""Errors about models, weights and training that say what to do next."""

from collections.abc import Sequence


class ModelError(ValueError):
    """A model, weights file or training setting that cannot be used as asked. Ends the command with exit code 2.

    Args:
        problem: What is wrong, with the offending value.
        valid: The values that would be accepted.
        hint: The next step.
    """

    exit_code = 2

    def __init__(self, problem: str, *, valid: Sequence[object] | str | None = None, hint: str | None = None) -> None:
        lines = [problem]
        if valid is not None:
            shown = valid if isinstance(valid, str) else ", ".join(str(value) for value in valid)
            lines.append(f"  valid: {shown}")
        if hint is not None:
            lines.append(f"  next:  {hint}")
        super().__init__("\n".join(lines))


class NonFiniteLossError(RuntimeError):
    """The training loss became NaN or infinite. Ends the command with exit code 3; earlier checkpoints stay."""

    exit_code = 3
