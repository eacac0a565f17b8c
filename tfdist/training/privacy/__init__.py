"""Private training (DP-SGD): each example's gradient cut to a norm, one noise in the sum, and the ε of it."""
