"""The reward service: trajectories in, samples out."""
