"""The learning-rate study: tasks, optimizers, runs, what is measured, figures."""
