"""What a person is told of a run: progress, rates, where the time goes."""
