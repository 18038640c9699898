"""Triton kernels for every GPU from sm_80."""
