"""The accuracy benchmark of `trace diff`: planted faults and clean pairs, and what the tool and others make of them.

    python -m tests.bench.accuracy

Runs are real training runs recorded through the recorder.  A fault is a changed setting, or something done inside the running
loop (`plants`), so that everything after it follows from it.  Only where the fault *is* a damaged record is a trace
edited afterwards (`edits`).  What is expected of a pair is written down with it; nothing here looks at a
result to decide what to expect.
"""
