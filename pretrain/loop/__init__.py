"""What the training loop stands on: the account of the samples."""
