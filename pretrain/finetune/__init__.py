"""Fine-tuning jobs on the same loop, engine and stream as pretraining."""
