"""Exported backbones as models of torchgeo-bench and kaiko-eva."""
