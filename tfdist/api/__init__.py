"""What a user's script calls: `initialize`, and the `Run` that it returns."""
