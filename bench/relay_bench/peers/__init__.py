"""``relay-bench compare --peers``: the relay beside other proxies that do its work, each started and stopped here.

A peer is a file in ``bench/peers``: how it is found, configured, started. All that are installed stand before the same
built-in engine at once; in each round every one of them, and the engine itself, meets every scenario once, in an order
drawn anew, so that what drifts falls on all alike. The proxies have a core of their own; load and engine have the rest.

Scenarios of CPU open streams with a client that only counts (`relay_bench.crowd`) and divide the CPU time of the
proxy's process tree, as the kernel accounts for it, by the frames or requests that came. The scenario of latency is a
schedule of ``relay-bench load``, paired with the same one direct.

Pure: `definition`, `summary`. On processes: `running`, `machine`, `scenarios`, `rounds`.
"""
