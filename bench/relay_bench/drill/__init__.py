"""``relay-bench drill NAME``: what a relay promises for bad days, tried on real processes, and judged.

`kill`, `hangups`, `rolling` and `affinity` each set up engines and a relay (`stage`), send requests (`client`), look at
what is left behind (`rest`), and make a `report` of figures and promises, each kept or broken.
"""
