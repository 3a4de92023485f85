"""``relay-bench drill NAME``: what a relay promises for bad days, tried on real processes, and judged.

Each drill sets up engines and a relay (`stage`), sends requests (`client`), looks at
what is left behind (`rest`), and makes a `report` of figures and promises, each kept or broken.
"""
