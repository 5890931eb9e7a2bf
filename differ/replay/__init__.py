"""Recompute a phase in float64 from one side's own recorded inputs, and say which known rule gives its outputs.

Nothing here looks at a class name or a setting that the numbers do not bear out, and nothing compares two sides.
"""
