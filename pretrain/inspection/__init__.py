"""Looking into a run's data without training: the samples of a step, and what streaming a corpus will take."""
