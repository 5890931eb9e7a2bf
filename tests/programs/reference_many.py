"""Several traces recomputed in one process.  reference_many.py CASES.json RESULTS.json

CASES: {name: [trace, {option: value}]}; a result is what was measured, or the error as a user would read it.
"""

import json
import sys
from pathlib import Path

from scenarios.reference.engine import Options, measure
from tracer.errors import TraceError
from tracer.reader import open_trace

results = {}
for name, (trace, options) in json.loads(Path(sys.argv[1]).read_text()).items():
    try:
        with open_trace(trace) as opened:
            results[name] = measure(opened, Options(**options)).to_json()
    except TraceError as error:
        results[name] = {"error": error.line()}
Path(sys.argv[2]).write_text(json.dumps(results, allow_nan=False))
