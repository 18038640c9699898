"""What kernels are started with: the launcher, the choice of tiles, generated functions."""
