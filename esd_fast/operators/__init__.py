"""Definitions of operators that have a gradient of their own: checks, fake and gradient implementations.

What runs them is chosen in ``esd_fast.ops`` alone, which also registers them and has the public functions.
"""
