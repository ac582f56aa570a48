"""The one error a reader sees: what happened, why, and what to do about it."""

from __future__ import annotations


class HelpersError(Exception):
    """An expected failure, told in one line.

    Args:
        what: what could not be done, e.g. ``"cannot convert chatglm3-6b"``.
        why: the cause as found, e.g. ``"shard 2 of 7 is truncated: 1,024 of 4,096 bytes"``.
        fix: what the reader can do now, e.g. ``"download it again: python -m helpers fetch chatglm3-6b"``.
    """

    def __init__(self, what: str, why: str, fix: str) -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__(f"{what}: {why}. {fix[:1].upper()}{fix[1:]}.")


def unknown(kind: str, value: object, valid: list[str]) -> HelpersError:
    """Build the error for a name that is not in a list, naming the near misses first and then every valid one."""
    import difflib

    near = difflib.get_close_matches(str(value), valid, n=3)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return HelpersError(
        f"unknown {kind} {value!r}", "it is not one of the names known here", f"{hint}valid: {', '.join(valid)}"
    )
