"""What the Triton kernels share: launching, launch configurations, addressing, tiles, weight gradients."""
