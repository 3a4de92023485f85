"""``python -m relay_bench.drill`` is ``relay-bench drill``."""

import sys

from relay_bench.drill.command import main

sys.exit(main())
