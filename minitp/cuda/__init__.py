"""Fused kernels for NVIDIA GPUs, each the twin of explicit operations in `ops`, and the step made of them."""
