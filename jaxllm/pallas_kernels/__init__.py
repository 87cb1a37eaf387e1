"""Ops with a kernel or a plain-XLA form each: reference, implementations, dispatch.

An op owns the order in which its large operands are stored, and says which.
"""
