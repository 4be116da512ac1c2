"""The server's stages: cluster, distill, merge, tune, direct, controls, evaluate."""
