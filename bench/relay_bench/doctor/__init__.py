"""``relay-bench doctor URL``: is this path fit for streaming?

What everybody does by hand with curl when a chatbot does not feel alive, done with a clock: a few streamed requests are
sent as an SDK would send them, every read is stamped, and what stands between an engine and the feeling of a live
answer is named, with the setting that mends it in the usual proxies. With ``--direct`` the same is seen without the
path, so that what the engine does itself is not held against what stands before it.

`observe` sends and stamps, `findings` judges (pure), `mends` knows the settings.
"""
