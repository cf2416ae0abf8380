"""What is also done by other libraries, in turn with them on the same input and weights."""
