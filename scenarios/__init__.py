"""Training runs to record: a path is an ordinary training program behind one configuration.

`scenarios` may use `tracer` and `differ`; neither imports it.  Only `scenarios/paths/*` imports a framework, and only inside
functions.  A path knows nothing of the recorder except `tracer.declare`.
"""
