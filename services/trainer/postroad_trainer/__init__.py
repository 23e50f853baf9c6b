"""The trainer service: feeder, assembler, step, publication and checkpoints of one run."""
