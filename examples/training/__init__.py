"""The parts of examples/train.py: data, models, optimizers by name, the curves of a run, checkpoints."""
