"""Pretraining: `ViTPTrainer`, its start, its options and its run, distillation and the masked autoencoder.

Internal: users import the names of `modeling_vitp`, see "What lies where" in `modeling_vitp/README.md`.
"""
