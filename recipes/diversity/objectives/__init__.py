"""The objectives that move the members of an ensemble apart: a file each."""
