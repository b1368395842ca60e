"""The learning-rate study: tasks, optimizers, plans of runs, what is measured, whether the targets are met."""
