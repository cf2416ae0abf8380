"""Files to pixels, windows of large images, corruptions: whatever the task.

Internal: users import the names of `modeling_vitp`, see "What lies where" in `modeling_vitp/README.md`.
"""
