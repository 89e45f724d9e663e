"""The student: its model, DeepSpeed strategy, rank actors and checkpoints."""
