"""The teacher-forced reference: recompute each recorded step's loss and gradients in torch, from that step's own inputs.

A trace of any path is enough: the base model is loaded by name and checked against the digests of the frozen weights, the
adapters and all trained parameters are the recorded ones, the batch is the recorded one.  torch and transformers are imported
when a model is built, never before.
"""
