"""`python -m tracer` is `trace`."""

from tracer.cli.main import main

main()
