"""`trace sweep`: settings times seeds over one or two paths, and how often each cell agrees or passes.

`plan` says what is run, `work` does one piece of it in a worker, `spread` gives the pieces to local processes or to a
Dask cluster, `table` counts.  Nothing here imports a framework: runs happen in processes of their own.
"""
