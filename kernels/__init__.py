"""Triton kernels, one file each, and the plain torch formulas they are tested against.

Installed as ``esd_fast.kernels``. Only relative imports in here: an editable install also makes the bare
name ``kernels`` importable, and transformers and diffusers look for a package of that name.
"""
