"""`trace bisect`: the smallest sets of settings, components or package pins that make one run diverge from another.

`ddmin` and `search` know nothing of training runs; `space` says what may be changed, `runs` records and compares, with a
cache and a budget; `report` renders.  Nothing here imports a framework.
"""
