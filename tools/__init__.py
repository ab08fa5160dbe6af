"""What makes the embedded models, their tasks and the table of families; no part of the package."""
