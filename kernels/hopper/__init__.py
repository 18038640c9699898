"""Gluon kernels for sm_90 (Hopper): TMA, asynchronous `wgmma`, warps with roles."""
