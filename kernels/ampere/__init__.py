"""Kernels for NVIDIA GPUs from sm_80, in Gluon: `mma.sync`, `ldmatrix` and `cp.async`."""
