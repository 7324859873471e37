"""Evidence without a GPU: what the compiled Triton kernels are made of.

``python -m bench.gpu_static`` is the command.

bench/README.md, "GPU kernels without a GPU", says how to read its table and where its limits are.
"""
