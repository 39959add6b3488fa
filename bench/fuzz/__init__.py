"""Fuzzing of everything that reads a model's files: `python -m edgeformer.bench.fuzz`."""
