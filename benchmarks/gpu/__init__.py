"""`make gpu-check`: what the CUDA backend computes and how fast, on the card at hand (docs/gpu.md)."""
