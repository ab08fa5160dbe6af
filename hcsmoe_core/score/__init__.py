"""How good a model is: tasks of lm-evaluation-harness, perplexity, and fidelity to the original."""
