"""The harness of relay: a built-in engine, a load generator and micro benchmarks."""
