"""The selection as Triton kernels, and their launchers."""
