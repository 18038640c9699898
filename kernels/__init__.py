"""What runs on tensors alone.

formats     the formats: packing and reference arithmetic in plain torch
portable    Triton kernels for every GPU from sm_80
hopper      Gluon kernels for sm_90
runtime     what kernels are started with: launcher, choice of tiles, generated functions
"""
