"""Pretraining: `ViTPTrainer`, its start, its options and its run, distillation and the masked autoencoder."""
