"""Ways to fine-tune with PEFT, recorded and recomputed on the base that they were made of.  reference_varieties.py FOLDER CASE…

Leaves FOLDER/results.json: what was measured, by case.
"""

import json
import sys
from pathlib import Path

from peft_varieties import build, train

import tracer
from scenarios.reference.engine import Options, measure
from tracer.reader import open_trace

folder = Path(sys.argv[1])
build("full").save_pretrained(folder / "base")
results = {}
for case in sys.argv[2:]:
    with tracer.record(folder / f"{case}.h5"):
        train(case)
    with open_trace(folder / f"{case}.h5") as trace:
        results[case] = measure(trace, Options(model=str(folder / "base"))).to_json()
(folder / "results.json").write_text(json.dumps(results, allow_nan=False))
