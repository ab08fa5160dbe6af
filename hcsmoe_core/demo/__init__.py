"""The embedded models, the corpus they were trained on and the tasks they are scored on."""
