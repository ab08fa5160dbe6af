"""What makes the embedded models and the documentation, and what ./run does; no part of the package."""
