"""Ready pieces for training frameworks; each imports its framework, so import the one you use.

`clara_fused.integrations.lightning`: a callback for Lightning. `clara_fused.integrations.transformers`: a
TrainerCallback for Hugging Face's Trainer. Both log the learning rates in force and the learning-rate scales.
"""
