"""Fine-tuning of classifiers of images: data, augmentation, trainer, pictures."""
