"""The training step on DeepSpeed: engine, gradient cache, optimizer groups, schedule, state and checkpoints."""
