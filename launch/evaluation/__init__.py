"""What launch/evaluate.py measures, and the adapter for lm-evaluation-harness."""
