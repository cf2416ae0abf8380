"""Files to pixels, windows of large images, corruptions: whatever the task."""
