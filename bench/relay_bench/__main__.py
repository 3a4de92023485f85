"""``python -m relay_bench`` is ``relay-bench``."""

from relay_bench.cli import main

raise SystemExit(main())
