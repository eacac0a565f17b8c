"""One optimizer step: Keras's own, for a replica among others or alone, checked and compiled."""
