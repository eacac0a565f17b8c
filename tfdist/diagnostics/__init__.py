"""Looks for what will keep a run from working, and for what has ended one; loads no TensorFlow.

`facts` says what one task sees, `rendezvous` what it sees of the others; each check is a pure function from the facts
of all tasks to findings.
"""
