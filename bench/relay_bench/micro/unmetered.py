"""``python -m relay_bench.micro.unmetered``: a relay that wants to know nothing of a frame but where it ends.

To be measured beside the real one: every frame of one line in a chunk of its own is taken for ordinary content.
"""

from __future__ import annotations

import re

from relay.cli import main
from relay.core import ordinary

_ANY_FRAME = re.compile(rb"([0-9A-Fa-f]{1,8}+)\r\n([^\r\n]++)\n\n\r\n")

if __name__ == "__main__":
    ordinary.CHUNKS.update(dict.fromkeys(ordinary.CHUNKS, ordinary.Form(_ANY_FRAME, is_line=True)))
    raise SystemExit(main())
