"""Fine-tuning for maps: semantic segmentation and change detection from images with masks."""
