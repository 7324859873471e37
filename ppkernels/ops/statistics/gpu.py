"""The statistics as Triton kernels, and their launchers."""
