"""Detection: horizontal and oriented boxes and instance masks, from images with annotated objects."""
