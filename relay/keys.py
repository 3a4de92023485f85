"""``relay key new``: a key for a client, shown once, and the line that lets its holder in."""

from __future__ import annotations

import secrets
import sys
from typing import Final

from relay.core.auth import check_name, keys_line

#: "sk-" is what clients expect a key to begin with; the rest of it lets scanners for leaked secrets find one.
PREFIX: Final = "sk-relay-"
#: 256 bits, so that a plain SHA-256 is as good a store as any: `relay.core.auth`.
KEY_BYTES: Final = 32

_DONE, _WRONG_USAGE = 0, 2


def main(name: str) -> int:
    """Print a new key on standard error and its line on standard output; the exit status, 2 for a wrong `name`.

    So that ``relay key new NAME >> FILE`` stores the line, and the key is seen by a person alone.
    """
    try:
        check_name(name)
    except ValueError as error:
        print(f"relay key new: {name!r} is {error}", file=sys.stderr)
        return _WRONG_USAGE
    key = new_key()
    where = ":\n" if sys.stdout.isatty() else " went to standard output."
    print(
        f"The key of {name}, shown once and stored nowhere; clients send it as `Authorization: Bearer KEY`:\n\n"
        f"    {key}\n\n"
        f"The line for the file that auth.keys_file names{where}",
        file=sys.stderr,
        flush=True,
    )
    print(keys_line(name, key.encode("ascii")))
    return _DONE


def new_key() -> str:
    """A key that nobody has had before."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)
