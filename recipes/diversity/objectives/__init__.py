"""What moves an ensemble's members apart: a file for each objective."""
