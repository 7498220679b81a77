"""What a run writes down: metrics, TensorBoard, journals of faults, profiles, and which code made it."""
