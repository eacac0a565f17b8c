"""Words that trials and those who read them have in common."""

# A line that begins so is what a trial has found, as JSON.
MARK = "tfdist-probe "
# The name of a trial in which no worker shares anything.
OWN = "own"
