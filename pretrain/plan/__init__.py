"""Looking without training: a dry run, memory, what streaming will take, the samples of a step."""
