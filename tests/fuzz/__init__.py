"""Coverage-guided fuzzing of what reads the bytes of others; not part of the suite but for its regression cases.

`atheris` is no dependency of the project (pip install atheris). One command for each target, until it is stopped or
for so many seconds::

    nice python -m tests.fuzz framing -dict=tests/fuzz/tokens.dict -max_total_time=300
    nice python -m tests.fuzz frames -dict=tests/fuzz/tokens.dict -max_total_time=300

What it finds it writes to ``crash-*``: those bytes go into `tests.fuzz.test_found`, by name.
"""
